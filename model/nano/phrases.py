"""The sentences of nano's world as data: how people ask, and what they say that nano does not understand.

In a question `{a}` is "a red circle", `{one}` "red circle", `{many}` "red circles". In OTHER each name stands for one of FILLERS.
"""

NO_PICTURE = "I have no picture to look at."
NOT_UNDERSTOOD = "Sorry, I did not understand."

QUESTIONS = {
    "describe": (
        "What do you see?", "What can you see?", "What do you see in the picture?", "What is in the picture?", "What's in the picture?",
        "Describe the picture.", "Describe what you see.", "Tell me what you see.", "Can you describe the picture?", "What is there?",
        "What are you looking at?", "What is in front of you?", "Look at this and tell me what it is.", "What does the picture show?",
        "Which shapes do you see?", "What shapes are there?", "Take a look and tell me what you see.", "What is on the table?",
        "What is this?", "Describe the scene.",
    ),
    "count": (
        "How many {many} are there?", "How many {many} do you see?", "How many {many} can you see?", "Count the {many}.",
        "How many {many} are in the picture?", "Tell me how many {many} there are.", "Can you count the {many}?",
        "Count the {many} for me.", "What is the number of {many}?", "How many {many}?", "I want to know how many {many} there are.",
    ),
    "colour": (
        "What colour is the {one}?", "Which colour is the {one}?", "What is the colour of the {one}?", "Tell me the colour of the {one}.",
        "Can you tell me what colour the {one} is?", "What colour does the {one} have?", "Say what colour the {one} is.",
        "What's the colour of the {one}?", "Name the colour of the {one}.", "Do you know what colour the {one} is?",
    ),
    "exists": (
        "Is there {a}?", "Is there {a} in the picture?", "Do you see {a}?", "Can you see {a}?", "Can you see {a} anywhere?",
        "Does the picture show {a}?", "Are there any {many}?", "Do you see any {many}?", "Is there {a} in view?",
        "Tell me if there is {a}.", "I wonder if there is {a}.", "Have you got {a} there?",
    ),
    "where": (
        "Where is the {one}?", "Where is the {one} in the picture?", "Where's the {one}?", "Find the {one}.", "Point at the {one}.",
        "Point to the {one}.", "Show me the {one}.", "Show me where the {one} is.", "Can you find the {one}?", "Mark the {one}.",
        "Where do you see the {one}?", "Draw a box around the {one}.", "Tell me where the {one} is.", "Find the {many}.",
        "Where are the {many}?", "Locate the {one}.",
    ),
}

TALK = {
    "hello": (("Hello.", "Hi.", "Hey there.", "Hello there.", "Good morning.", "Good afternoon.", "Good evening.", "Hi there.",
               "Hello, can you hear me?", "Are you there?", "Hey, hello."), "Hello, I am listening."),
    "name": (("What is your name?", "Who are you?", "What's your name?", "Tell me your name.", "What are you called?", "Which model are you?",
              "What are you?", "Do you have a name?", "Who am I talking to?"), "I am attend, running the nano model."),
    "ability": (("What can you do?", "What can I ask you?", "How can you help me?", "Help me.", "What do you know?", "What are you able to do?",
                 "Tell me what you can do.", "How do you work?", "What should I ask?"),
                "I can name, count and point at coloured shapes."),
    "thanks": (("Thank you.", "Thanks.", "Thank you very much.", "Thanks a lot.", "Many thanks.", "That was helpful, thank you.",
                "Great, thanks.", "Well done.", "Good job."), "You are welcome."),
    "goodbye": (("Goodbye.", "Bye.", "Bye bye.", "See you later.", "See you tomorrow.", "That is all for today.", "Good night.",
                 "I have to go now.", "Talk to you later."), "Goodbye."),
}

TRANSCRIBE = (
    "Transcribe.", "Transcribe the speech.", "Write down what I said.", "Write down the words.", "What did I say?", "Transcribe what you heard.",
    "Transcribe the audio.", "Write what was said.", "Repeat what I said word for word.", "Put the speech into words.",
)

# Small words around a sentence: before and after any, and those that only go with an order, known by its first word.
OPENINGS = ("Okay,", "So,", "Hey,", "And", "Well,", "Excuse me,", "Now,")
CLOSINGS = (", okay", " now", " again")
ORDER_OPENINGS = ("Please", "Now", "Then", "Could you", *OPENINGS[:3])
ORDER_CLOSINGS = (", please", " for me", " now", " again")
ORDERS = {
    "Add", "Book", "Bring", "Buy", "Call", "Close", "Count", "Describe", "Draw", "Explain", "Find", "Give", "Guess", "Locate", "Make",
    "Mark", "Move", "Name", "Open", "Order", "Paint", "Play", "Point", "Read", "Remind", "Remove", "Say", "Send", "Set", "Show", "Sing",
    "Spell", "Stop", "Switch", "Take", "Teach", "Tell", "Translate", "Turn", "Wake",
}

FILLERS = {
    "object": ("dog", "cat", "car", "phone", "key", "chair", "table", "book", "cup", "tree", "house", "door", "window", "bird", "bicycle",
               "bottle", "ball", "shoe", "hat", "lamp", "spoon", "clock", "bag", "horse", "train", "person", "face", "hand", "box", "pen"),
    "objects": ("dogs", "cats", "cars", "phones", "keys", "chairs", "tables", "books", "cups", "trees", "houses", "doors", "windows", "birds",
                "people", "children", "bottles", "balls", "shoes", "fingers", "cows", "apples", "coins", "letters"),
    "tone": ("pink", "brown", "black", "white", "grey", "golden", "silver"),
    "form": ("hexagon", "rectangle", "heart", "diamond", "cube", "cross", "moon", "line", "ring", "pyramid"),
    "forms": ("hexagons", "rectangles", "hearts", "diamonds", "cubes", "crosses", "moons", "lines", "rings", "pyramids"),
    "colour": ("red", "green", "blue", "yellow", "orange", "purple"),
    "shape": ("circle", "square", "triangle", "star"),
    "shapes": ("circles", "squares", "triangles", "stars"),
    "person": ("my mother", "my father", "my brother", "my sister", "Anna", "Peter", "John", "Mary", "the teacher", "the doctor", "my friend",
               "our neighbour", "the boss", "the baby"),
    "place": ("London", "Paris", "Berlin", "the kitchen", "the garden", "the office", "the station", "school", "the market", "the park",
              "the beach", "town", "Rome", "the library", "the cinema"),
    "food": ("bread", "cheese", "soup", "rice", "pizza", "cake", "coffee", "tea", "milk", "butter", "chocolate", "salad", "fish"),
    "time": ("today", "tomorrow", "tonight", "this morning", "next week", "on Monday", "on Friday", "at noon", "in the summer", "this weekend",
             "after lunch", "in an hour"),
    "music": ("jazz", "some music", "a song", "the radio", "the news", "a podcast", "the piano", "my favourite album"),
    "device": ("light", "heating", "television", "fan", "oven", "radio", "alarm", "camera", "computer", "printer", "washing machine"),
    "topic": ("history", "football", "politics", "mathematics", "cooking", "physics", "music", "travel", "animals", "the weather", "money",
              "the stars in the sky", "square roots", "the love triangle", "the traffic circle", "health"),
    "feeling": ("tired", "happy", "hungry", "cold", "sad", "bored", "fine", "sick", "angry", "busy", "late"),
}

OTHER = (
    # close to what nano knows
    "How many {objects} are there?", "How many {objects} do you see?", "Count the {objects}.", "How many {forms} are there?",
    "How many {tone} {shapes} are there?", "Can you count the {forms}?", "How many {colour} {objects} can you see?",
    "What colour is the {object}?", "What colour is the {form}?", "What colour is the sky?", "What is the colour of my {object}?",
    "What colour do you like?", "What is your favourite colour?", "Which colour goes with {colour}?", "Do you like {colour}?",
    "Is there a {object}?", "Is there a {form}?", "Is there a {tone} {shape}?", "Do you see a {object}?", "Can you see the {object}?",
    "Is there a {colour} {object}?", "Do you see any {objects}?", "Are there any {forms}?", "Is there {food} on the table?",
    "Where is the {object}?", "Where is my {object}?", "Where is the {form}?", "Where is the {tone} {shape}?", "Find the {object}.",
    "Find the {tone} {shape}.", "Point at the {object}.", "Show me the {object}.", "Where is {person}?", "Where is {place}?", "Find my {object}.",
    "Point to the {colour} {object}.", "Mark the {form}.", "Where are the {objects}?", "Where are you?", "Where am I?", "Show me {place}.",
    "Draw a {shape}.", "Draw a {colour} {shape}.", "Paint the {shape} {colour}.", "Remove the {shape}.", "Move the {colour} {shape} to the left.",
    "What is a {shape}?", "How many sides has a {shape}?", "Why is the {shape} {colour}?", "Do you like {shapes}?", "I like {colour} {shapes}.",
    "The {colour} {shape} is mine.", "I bought a {colour} {object}.", "My {object} is {colour}.", "Who drew the {shape}?", "How big is the {shape}?",
    "How old is the {object}?", "What does {person} see?", "What did {person} say?", "Describe {place}.", "Describe {person}.",
    "Tell me what {person} wants.", "What is {person} called?", "What can {person} do?", "What is the name of {person}?", "Who is {person}?",
    "How are you?", "How old are you?", "Where do you live?", "Who made you?", "Do you sleep?", "Are you a robot?", "Can you sing?",
    # requests
    "Turn on the {device}.", "Turn off the {device}.", "Switch the {device} on {time}.", "Is the {device} on?", "The {device} is broken.",
    "Can you fix the {device}?", "Play {music}.", "Stop {music}.", "I want to hear {music}.", "Can you play {music} {time}?", "Turn it up.",
    "Make it louder.", "Be quiet.", "Set an alarm for {time}.", "Wake me up {time}.", "Remind me to call {person}.", "Call {person}.",
    "Send a message to {person}.", "Write a letter to {person}.", "Read me the news.", "Read the next page.", "Open the door.",
    "Close the window.", "Open the {object}.", "Bring me the {object}.", "Give me some {food}.", "Order {food} for {person}.",
    "Add {food} to the list.", "Book a table {time}.", "Buy a ticket to {place}.", "Take me to {place}.", "Translate this into French.",
    "Tell me a joke.", "Tell me a story about {person}.", "Sing me a song.", "Tell me something about {topic}.", "Teach me {topic}.",
    "Explain {topic} to me.", "Guess a number.", "Spell the word {object}.", "Do my homework.", "Add two and three.", "Let us play a game.",
    # questions
    "What time is it?", "What day is it {time}?", "What is the weather like {time}?", "Will it rain {time}?", "Is it cold in {place}?",
    "How far is it to {place}?", "How do I get to {place}?", "When does the train to {place} leave?", "Is the shop open {time}?",
    "What should I eat {time}?", "How do I cook {food}?", "How much is the {object}?", "How much {food} do I need?", "Do we have {food}?",
    "Do you like {food}?", "What is two plus two?", "Who won the match?", "Who wrote this book?", "What is the capital of France?",
    "Why is the sky blue?", "Why is the grass green?", "When is the meeting?", "What is on television {time}?", "What are you doing {time}?",
    "Are you coming to {place}?", "Did {person} call?", "Has {person} eaten?", "When does {person} come home?", "Is {person} at {place}?",
    "What happened in {place}?", "Do you know {person}?", "Have you been to {place}?", "Can I have {food}?", "May I borrow your {object}?",
    "What do you think about {topic}?", "Do you understand {topic}?", "Which {object} is better?", "Whose {object} is this?",
    # statements
    "I am {feeling}.", "I am {feeling} {time}.", "{person} is {feeling}.", "I think {person} is {feeling}.", "We are going to {place} {time}.",
    "I was in {place} with {person}.", "{person} lives in {place}.", "{person} likes {food}.", "I had {food} {time}.",
    "There is {food} in the kitchen.", "I lost my {object}.", "I forgot the {object}.", "The {object} is on the {object}.",
    "The {object} belongs to {person}.", "The {objects} are sleeping.", "The {objects} are too expensive.", "I can not find my {object}.",
    "I need a new {object}.", "I talked to {person} about {topic}.", "I am reading a book about {topic}.", "{person} plays {music}.",
    "We listened to {music} {time}.", "It is raining in {place}.", "It is too warm in here.", "It was a long day.", "The train is late again.",
    "I do not know.", "That is not true.", "You are wrong.", "I do not care.", "Never mind.", "Wait a minute.", "Come here.", "Go away.",
    "Yes.", "No.", "Maybe later.", "Of course.", "That sounds good.", "One two three.", "Testing the microphone.", "I love you.",
    "The quick brown fox jumps over the lazy dog.", "Once upon a time there was a king.", "Happy birthday to you.", "Nice to meet you, {person}.",
    "My name is {person}.", "Let me think about it.", "Let us talk about {topic}.", "{person} knows a lot about {topic}.",
    "You should ask {person} {time}.", "I would like some {food}, and {food} for {person}.", "If it rains we stay at home.",
)
