"""Write jaxsvd/demo_chats.txt: chats of SmolLM2-135M-Instruct with itself, for calibration by `make demo`.

    python benchmarks/demo_chats.py     # minutes on two cores

Text that a model writes itself shows a compressor what the model is used for, right or wrong: the answers matter as
samples of its inputs, not as facts. None of the questions is one that tests/parity/test_demo_answers.py asks.
"""

from pathlib import Path

import jaxsvd
from jaxsvd.demo import get_demo_model

TARGET = Path(__file__).parents[1] / "jaxsvd" / "demo_chats.txt"
BATCH = 28  # what a small machine has memory for
QUESTIONS = """
What is the capital of Italy?
What is the capital of Canada?
What is the capital of Egypt?
What is the capital of Brazil?
What language is spoken in Germany?
What language do people speak in Portugal?
In which country is the city of Mumbai?
On which continent is Kenya?
What is the longest river in Africa?
What is the highest mountain in the world?
Which ocean lies between Europe and America?
What is the largest planet in the solar system?
What do we call the star at the centre of the solar system?
How long does the Earth take to go around the Sun?
How many months are there in a year?
How many hours are there in a day?
How many minutes are there in an hour?
How many legs does a spider have?
How many sides does a triangle have?
What is 3 plus 4?
What is 10 minus 6?
What is 5 times 5?
What is half of 20?
Which number comes after 99?
What is the opposite of big?
What is the opposite of fast?
What is the opposite of day?
What is another word for happy?
What is the plural of mouse?
What is the past tense of go?
Name the last month of the year.
Name a day of the weekend.
Name three fruits.
Name two colors of the rainbow.
Name a musical instrument with strings.
What color is grass?
What color is snow?
What color do you get when you mix blue and yellow?
Which animal barks?
Which animal gives us milk?
Which bird can't fly and lives in Antarctica?
What do caterpillars turn into?
What do cows eat?
What is a group of wolves called?
At what temperature does water freeze?
What is ice made of?
What gas do people breathe in to live?
Which metal is attracted by a magnet?
What is the chemical symbol of gold?
What is photosynthesis?
What does a thermometer measure?
What is a computer?
What is the internet used for?
Who painted the Mona Lisa?
Who wrote Hamlet?
Who discovered gravity?
Who was Albert Einstein?
In which year did the Second World War end?
What is a democracy?
What is a budget?
How do I boil an egg?
How do I make a cup of tea?
How can I sleep better?
How can I save money?
How do I write a thank-you letter?
Write a short poem about the sea.
Write one sentence about friendship.
Tell me a short story about a cat.
Give me one tip for learning a language.
Give me a simple recipe for soup.
Explain rain to a child.
Explain what a mortgage is in two sentences.
Why do leaves fall in autumn?
Why is exercise good for you?
Why do we have seasons?
What should I wear when it is cold?
What is the difference between a lake and a river?
Translate "good morning" into French.
Summarize in one sentence: The dog chased the ball across the park and came back tired.
Correct this sentence: She go to school yesterday.
Is a whale a fish?
Is the Moon larger than the Earth?
Hello, who are you?
Can you help me with my homework?
""".strip().splitlines()


def main() -> None:
    model = jaxsvd.load(get_demo_model())
    (end, _) = model.tokenizer.eos
    with TARGET.open("w", encoding="utf-8") as file:
        for start in range(0, len(QUESTIONS), BATCH):
            asked = [[{"role": "user", "content": question}] for question in QUESTIONS[start : start + BATCH]]
            for messages, answer in zip(asked, model.generate(asked, max_new_tokens=96), strict=True):
                ended = end if answer.finish_reason == "stop" else ""
                file.write(model.tokenizer.render(messages) + answer.text + ended + "\n")


if __name__ == "__main__":
    main()
