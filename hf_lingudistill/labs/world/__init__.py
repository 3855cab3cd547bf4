"""A small world to look at: things under shared names, drawn by five artists, or real captions from the Hub.

python -m hf_lingudistill.labs.world.art       # fetch the drawings once (7.6 MB, npm)

world = emoji_world()                          # or caption_world("owner/dataset", image="image", caption="caption")
world.pictures("long", SEEN)                   # drawings with captions: "a lobster"
short_rows(world.pictures("short", SEEN), 100, seed=0)
"""
