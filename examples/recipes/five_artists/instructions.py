"""Instructions with demands on form ("in lower case", "three bullet points"), as IFEval's prompts make them; none of them is one of IFEval's.

Regime M's text rows ask questions whose answers are short. Whether text rows of this kind bring instruction following back is a trial of
its own: `texts: instructions` in recipe.yaml.
"""

from __future__ import annotations

import random

TASKS = (
    "Write a short email to a colleague about {topic}.",
    "Write a blog post about {topic}.",
    "Explain {topic} to a ten-year-old.",
    "Write a poem about {topic}.",
    "Give me tips about {topic}.",
    "Write a letter of complaint about {topic}.",
    "Tell a story that has to do with {topic}.",
    "Summarize what people should know about {topic}.",
    "Write an advertisement that has to do with {topic}.",
    "Plan a weekend course on {topic}.",
    "Write a dialogue between two neighbors about {topic}.",
    "Argue for and against spending money on {topic}.",
    "Write a song about {topic}.",
    "Write the opening of a speech about {topic}.",
    "List questions that a beginner has about {topic}.",
    "Write a riddle about {topic}.",
)

TOPICS = (
    "growing tomatoes", "night trains", "learning the violin", "electric bicycles", "honey bees", "old maps", "public libraries",
    "sleeping better", "moving to another city", "baking bread", "chess", "the moon", "a broken elevator", "coral reefs",
    "saving water", "street markets", "lost luggage", "training a puppy", "winter tires", "the history of tea", "job interviews",
    "beach cleaning", "solar panels", "first aid", "family recipes", "noisy neighbors", "volcanoes", "repairing shoes",
    "museums for children", "school lunches", "sailing", "keeping a diary", "wind power", "second-hand clothes", "rainy holidays",
    "robots at home", "the metric system", "running a marathon", "folk tales", "city parks",
)  # fmt: skip

# Two demands of one kind may contradict each other: an instruction has at most one of each
DEMANDS = {
    "case": (
        "Use no capital letters at all.",
        "Write everything in capital letters.",
        "Write at least three words in capital letters.",
    ),
    "length": (
        "Use at least 200 words.",
        "Use fewer than 60 words.",
        "Write at least ten sentences.",
        "Write fewer than six sentences.",
    ),
    "parts": (
        "Answer in exactly three bullet points that begin with *.",
        "Answer with five bullet points, each beginning with an asterisk.",
        "Write four paragraphs and put *** between them.",
        "Write exactly two paragraphs, with a blank line between them.",
        "Divide it into three parts headed PART 1, PART 2 and PART 3.",
        "Give two different answers with ****** between them.",
        "Let the second paragraph begin with the word {first}.",
        "Give the answer as JSON.",
    ),
    "words": (
        "Mention the words {first} and {second}.",
        "Do not use the word {first}.",
        "Use the word {first} at least three times.",
        "Use the letter q at least four times.",
    ),
    "marks": (
        "Do without commas.",
        "Put the whole answer in double quotation marks.",
        "Leave at least two blanks to fill in, in square brackets, such as [name].",
        "Highlight at least two passages with *asterisks*.",
    ),
    "frame": (
        "Begin with a title in double angle brackets, like <<Title>>.",
        "Close with the sentence: That is all for today.",
        "Add a postscript that begins with P.S.",
        "First repeat this request word for word, and then answer it.",
    ),
}

WORDS = (
    "river", "never", "simple", "window", "always", "market", "quiet", "because", "garden", "early", "letter", "second", "summer",
    "paper", "careful", "people", "yellow", "morning", "answer", "money",
)  # fmt: skip


def instructions(n: int, *, seed: int = 0) -> list[str]:
    """n different instructions, with one demand or (every third) two of different kinds.

    Raises:
        ValueError: if there are not so many different ones.
    """
    if n > len(TASKS) * len(TOPICS):
        raise ValueError(f"Expected at most {len(TASKS) * len(TOPICS)} instructions, found {n}.")
    rng = random.Random(seed)
    chosen = rng.sample([(task, topic) for task in TASKS for topic in TOPICS], n)
    found = []
    for index, (task, topic) in enumerate(chosen):
        first, second = rng.sample(WORDS, 2)
        demands = [rng.choice(DEMANDS[kind]) for kind in rng.sample(sorted(DEMANDS), 2 if index % 3 == 2 else 1)]
        found.append(" ".join([task.format(topic=topic), *demands]).format(first=first, second=second))
    return found
