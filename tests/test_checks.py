"""Verifiers of free answers: what they accept and refuse, own ones, and tasks that are scored by them."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ivlens as ivl
from ivlens.tasks import checks
from ivlens.tasks.checks import CHECKS, check_source, parse_check, passes, register_check
from ivlens.tasks.prompts import build_prompts

SPLITS = ("train", "valid", "test")

RIGHT = {
    "bullets": [
        "* *Coffee is a versatile beverage made from a blend of grounds and water.\n* *Coffee is a popular beverage "
        "consumed worldwide, enjoyed for its taste, aroma, and flavor.\n",
        "* Spider web building*\n* *Spider web* is a complex process involving the development of a flexible and "
        "durable material that can withstand the harsh environment. *Spider web* is a marvel",
        "* Tea is a drink.\n* It is made from leaves.\n* People drink it hot.",
        "- Water\n- Milk",
        "• Hot\n• Sweet\n• Cheap",
        "•Hot\n•Sweet",
        "Here are some facts about tea:\n\n* It is hot.\n* It is made from leaves.",
        "* **Origin**: China\n* **Colour**: green or black\n* **Taste**: bitt",
        "* Tea is a drink\n* It comes from China\n* **",
        "* Les feuilles sont séchées.\n* L’eau est bouillie.",
        "* 茶是一种饮料\n* 它来自中国",
        "* One egg\n  * whole\n  * fresh\n* Two cups of flour",
        "+ Fill the kettle.\n+ Boil the water.",
        "* Wash the dog.\n\n* Dry the dog.\n\n* Brush the",
    ],
    "numbered_list": [
        "1. Boil the water.\n2. Add the tea.\n3. Wait.",
        "1) Fill the kettle\n2) Switch it on",
        "Here are three points:\n1. It is hot.\n2. It is sweet.\n3. It is cheap.",
        "1. **Water**: fresh and cold\n2. **Tea**: one spoon a cup\n3. **",
        "1. Tea\n2. Milk\n3.",
        "**1. Origin**\nTea comes from China.\n**2. Taste**\nIt is bitter.",
        "1. Das Wasser kochen.\n\n2. Den Tee hinzufügen.",
        "1. 茶来自中国。\n2. 茶很好喝。",
        "(1) Fill the kettle.\n(2) Boil the water.",
        "1. Tea is a drink.\n   It is old.\n2. Tea is hot.\n   So take care.",
        "1. It is 4,000 years old.\n2. It has 2 colours.",
        "1. One\n2. Two\n3. Three\n4. Four\n5. Five\n6. Six\n7. Seven\n8. Eight\n9. Nine\n10. Ten",
    ],
    "json": [
        '{"answer": "Tea is a drink."}',
        '{"name": "tea", "hot": true, "cups": 2}',
        '```json\n{"answer": "Tea is a drink made from leaves."}\n```',
        '```\n{"answer": "It is hot."}\n```',
        '```json {"answer": "It is hot."} ```',
        '{\n  "tea": {\n    "colours": ["green", "black"]\n  }\n}',
        '["water", "tea", "milk"]',
        '[{"step": 1, "do": "Boil."}, {"step": 2, "do": "Wait."}]',
        '{"answer": "She said \\"tea\\" — très bien"}',
        '{"answer": 42}',
        "[1, 2, 3]",
        '{"réponse": "Le thé est chaud."}',
        '{"答案": "茶"}',
        '{"note": "", "answer": "Tea."}',
        '  {"answer": "yes"}\n',
    ],
    "title": [
        "<<Some Title>>\n\nThe sky blue is a result of the Earth's atmosphere scattering sunlight, primarily blue, "
        "allowing it to reach our planet's surface.",
        "<<All About Tea>>\n\nTea is a drink made from leaves.",
        "<<Tea>> Tea is a drink.",
        "**<<The History of Tea>>**\n\nTea was first",
        "# <<Tea>>\nIt is hot.",
        "Title: <<Tea Time>>\nTea is a drink.",
        "Here is a title: <<Tea>>\n\nAnd it is a good drink.",
        "Tea is a drink.\n<<A Cup of Tea>>",
        "<<Le thé, une boisson d’été>>\nLe thé est",
        "<<茶>>\n茶是一种饮料。",
        "<<1984>>\nA novel by George Orwell.",
        '"<<Tea>>"\nTea is hot.',
        "<<What Is Tea?>>\n\n* a drink\n* a plant",
    ],
    "poem": [
        "In the heart of the earth, a tree stands,\nA testament to the beauty of nature's might,\nA tree that stands "
        "tall, a symbol of life,\nA tree that stands,",
        "In a village of the sun,\nA small village of the sun,\nA village of the sun,\nA village of the sun.\n\nThe "
        "village of the sun is a place of",
        "In the night, when the stars shine bright,\nBats see with their eyes, a silent way,\nTheir ears, they listen, "
        "a silent way,\nTo see the darkness, a",
        "The tea is hot,\nThe cup is small,\nI drink it up,\nI drink it all.",
        "In morning light,\nI pour my tea,\nA golden cup\nFor you and me.",
        "**Tea**\n\nGreen leaves fall,\nWater sings,\nSteam climbs up\non silver wings.",
        "Tea\nLeaves in the pot\nThe water is hot\nI wait a while\nand then",
        "The sea is wide and deep and blue,\nIt sings a song for me and you,\nThe waves roll in, the waves roll",
        "O tea, O tea,\nHow sweet you are,\nO tea, O tea,\nYou came from far,\nA leaf",
        "Le thé est chaud,\nle ciel est beau,\net moi, je rêve\nau bord de l’eau.",
        "Der Tee ist heiß,\ndie Nacht ist weiß,\nund ich bin leis",
        "床前明月光\n疑是地上霜\n举头望明月\n低头思故乡",
        "“Come in,” said the rain,\n“Come in from the cold,”\nAnd I shut the door,\nFor I am old.",
        "The wind is low,  \nThe birds are still,  \nThe moon has climbed  \nAbove the hill.",
        "I wake —\nthe world is white again,\nsnow on every leaf,\nsnow on the lane",
    ],
    "quoted": [
        '"Tea is a drink made from leaves."',
        "“Tea is a drink made from leaves.”",
        "„Tee ist ein Getränk.“",
        "„Herbata to napój.”",
        "«Le thé est une boisson.»",
        "« Le thé est une boisson. »",
        "»Tee ist ein Getränk.«",
        "”Te är en dryck.”",
        '"It\'s hot, it\'s sweet, it\'s tea."',
        '"Tea is hot.\n\nIt is made from leaves."',
        ' "Water boils at 100 degrees." \n',
        '"No"',
        "“Tea is hot.\"",
        '"お茶は飲み物です。"',
    ],
    "capitals": [
        "TEA IS A DRINK MADE FROM LEAVES.",
        "TEA IS HOT! IT IS MADE FROM LEAVES, AND PEOPLE DR",
        "* TEA IS HOT.\n* TEA IS GOOD.",
        "**TEA** IS A DRINK.",
        "LE THÉ EST UNE BOISSON TRÈS APPRÉCIÉE.",
        "WATER BOILS AT 100 °C.",
        "ЧАЙ — ЭТО НАПИТОК.",
        "YES.",
        "1. BOIL THE WATER\n2. ADD TEA",
        '"IT\'S HOT," SHE SAID.',
        "THE 1ST CUP, THE 2ND CUP",
        "TEA (茶) IS A DRINK FROM CHINA",
    ],
    "lower_case": [
        "tea is a drink made from leaves.",
        "tea is hot. it is made from leaves, and people dr",
        "* tea is hot.\n* tea is good.",
        "le thé est une boisson très appréciée.",
        "water boils at 100 degrees.",
        "чай — это напиток.",
        "yes, of course.",
        "i like paris. i like london too.",
        "{'tea': 'hot'}",
        "“it’s hot,” she said.",
        "der tee ist heiß",
        "tea (茶) is a drink from china",
    ],
    "one_sentence": [
        "Tea is a drink made from the leaves of a plant.",
        "Why not try a cup of tea?",
        "Tea is wonderful and hot!",
        "The U.S. is a large country in North America.",
        "Dr. Smith says that tea is good for you.",
        "Tea is made from leaves, herbs, fruits, etc.",
        "Some drinks, e.g. tea and coffee, are served hot.",
        "J. R. R. Tolkien wrote The Lord of the Rings.",
        "**Tea is a hot drink.**",
        '"Tea is a hot drink."',
        "He asked “why?” and drank his tea.",
        "Well... tea is a kind of drink.",
        "Tea is a lovely drink! 😊",
        "It costs 3.50 dollars a cup.",
        "Le thé est une boisson très appréciée dans le monde.",
        "茶是一种很受欢迎的饮料。",
        "चाय एक पेय है।",
        "tea is a hot drink.",
        "Mr. Jones and his wife live at 5 St. Mary's Road.",
    ],
    "at_most_words: 12": [
        "Tea is a hot drink made from leaves.",
        "Water boils at 100 degrees Celsius.",
        "Tea.",
        "Yes!",
        "1969.",
        "one two three four five six seven eight nine ten eleven twelve",
        "It's a well-known drink, it's cheap, and it's good for everybody's health.",
        "Le thé est une boisson chaude.",
        "It costs 1,000 dollars.",
        "**Tea** is a *hot* drink.",
        "* Hot\n* Sweet",
        "चाय एक गर्म पेय है जो पत्तियों से बनता है।",
        "茶是热的饮料。",
        "Very, very good.",
    ],
    "at_most_words: 3": ["Hot tea.", "It is hot", "Tea", "42", "  Tea\n", "“Hot”", "1, 2", "Don't know.", "Très bien !", "No."],
    "ends_with: Is there anything else?": [
        "Tea is a drink. Is there anything else?",
        "Tea is a drink.\n\nIs there anything else?",
        "Tea is a drink. **Is there anything else?**",
        "Tea is a drink. _Is there anything else?_",
        "Tea is a drink. “Is there anything else?”",
        "Tea is a drink. Is there anything else",
        "Tea is a drink, is there anything else?",
        "TEA IS A DRINK. IS THERE ANYTHING ELSE?",
        "Le thé est une boisson. Is there anything else?",
        "Tea is a drink. Is  there\nanything else? 😊",
        "* hot\n* sweet\n\nIs there anything else?",
        "Yes. Is there anything else?",
    ],
    "ends_with: That's all, folks": [
        *("Tea is hot. That’s all, folks!", "Tea is hot. That's all, folks.", "It is late: that's all folks"),
    ],
    "no_comma": [
        "Tea is a drink made from leaves.",
        "Tea is hot. It is good. People like it.",
        "* Tea is hot\n* Tea is good\n* Tea is old",
        "Tea is made from leaves and people drink it in the mo",
        "El té es una bebida muy popular.",
        "It costs 3.50 dollars at the shop.",
        "“Tea is a hot drink” she said.",
        "Tea – a drink from China – is hot.",
        "Tea; a drink; from China; hot",
        "茶是一种很好的饮料。",
        '{"answer": "Tea is a very hot drink"}',
        "Is tea a drink? Yes it is!",
    ],
    "includes: river": [
        "The river flows to the sea.",
        "A River runs through it.",
        "Tea grows near the **river**.",
        "Tea grows near the _river_ in China.",
        "THE RIVER IS WIDE AND DEEP",
        "The river's water is cold.",
        "The river’s water is cold.",
        "Boats, bridges and a river: that is Paris.",
        "They live in a river-side house.",
        '{"answer": "It is a river"}',
        "* the sea\n* a river\n* a lake",
        "Water is in the lake, the sea, the “river”, and in the",
    ],
    "includes: café": ["We met in a cafe\u0301 in Paris.", "Un CAFÉ, s’il vous plaît !", "The café's door is open."],
    "includes: 河": ["这条河很长。", "黄河是中国的母亲河。"],
    "includes: green tea": ["I like green tea best of all.", "Some drink Green\nTea in the morning, at noon"],
    "avoids: the": [
        "Tea is a drink made from leaves.",
        "Water boils at a temperature of 100 degrees.",
        "There are many kinds of tea.",
        "They bathe in these other waters then.",
        "* Tea is hot\n* Tea is good\n* Tea is old",
        "TEA IS A VERY HOT DRINK.",
        "El té es una bebida muy popular.",
        "Tea comes from China, and people drink it in",
        "Theo loves tea, as does Thea.",
        "茶是一种很好的饮料。",
        '{"answer": "Tea is a very hot drink"}',
        "1. Boil water\n2. Add tea leaves\n3. Wait a little",
    ],
    "avoids: green tea": ["I drink tea from a green cup.", "Black tea, white tea and milk."],
    "language: es": [
        "El cielo es un cielo de la ciela, especialmente el cielo de la ciela, que está en el desierto. El",
        "El té es una bebida caliente que se prepara con hojas.",
        "El té es rico.",
        "Lo siento, pero no puedo ayudarte con eso.",
        "¡Claro! El agua hierve a 100 grados Celsius cuando",
        "* El té es una bebida.\n* Se prepara con agua caliente.",
        "**El té** es una bebida muy popular en todo el mundo.",
        "Los perros son animales leales. Necesitan comida, agua y cariño. También nec",
        "EL TÉ ES UNA BEBIDA MUY POPULAR.",
        "La Tour Eiffel es un monumento de París, Francia.",
        "Las películas de Hollywood, como Star Wars, son famosas en todo el mundo.",
        "“El mar es azul”, dijo el niño.",
        "Los volcanes son montañas que expulsan lava, cenizas y gases.",
        "Japón es un país de Asia",
    ],
    "language: fr": [
        "En l'auctre de l'amour, je suis désolé pour l'amour.\n\nJe suis désolé pour l'amour, je su",
        "Le thé est une boisson chaude préparée avec des feuilles.",
        "Le thé est chaud.",
        "Je suis désolé, mais je ne peux pas répondre.",
        "Les chiens sont des animaux fidèles. Ils ont besoin de nourr",
        "* Faire bouillir l’eau.\n* Ajouter les feuilles de thé.",
        "La mer est bleue et le ciel aussi.",
        "Paris est la capitale de la France.",
        "Pour faire du thé, il faut de l'eau chaude.",
        "L’eau bout à 100 degrés.",
        "“Bonjour”, dit le garçon à la fille.",
        "LES OISEAUX CHANTENT LE MATIN.",
        "1. Lavez la salade.\n2. Coupez les tomates.",
    ],
    "language: de": [
        "Tee ist ein heißes Getränk aus Blättern.",
        "Der Tee ist heiß.",
        "Es tut mir leid, aber das kann ich nicht beantworten.",
        "Hunde sind treue Tiere. Sie brauchen Futter, Wasser und viel Bew",
        "* Das Wasser kochen\n* Den Tee hinzufügen",
        "Das Meer ist blau und der Himmel auch.",
        "Berlin ist die Hauptstadt von Deutschland.",
        "Natürlich! Wasser kocht bei 100 Grad.",
        "„Guten Morgen“, sagte der Lehrer.",
        "DIE VÖGEL SINGEN AM MORGEN.",
        "1. Waschen Sie den Salat.\n2. Schneiden Sie die Tomaten.",
        "Die Bäume verlieren im Herbst ihre Blätter.",
    ],
    "language: it": [
        "In amore, ille stesso amore è ille.",
        "Il tè è una bevanda calda fatta con le foglie.",
        "Il tè è caldo.",
        "Mi dispiace, ma non posso rispondere.",
        "I cani sono animali fedeli. Hanno bisogno di cibo e acq",
        "* Far bollire l’acqua\n* Aggiungere le foglie di tè",
        "Il mare è blu e anche il cielo.",
        "Roma è la capitale d'Italia.",
        "Certo! L'acqua bolle a 100 gradi.",
        "“Buongiorno”, disse il ragazzo.",
        "GLI UCCELLI CANTANO LA MATTINA.",
        "1. Lavare l'insalata.\n2. Tagliare i pomodori.",
        "Gli alberi perdono le foglie in autunno.",
    ],
    "language: pt": [
        "O chá é uma bebida quente feita com folhas.",
        "O chá é quente.",
        "Desculpe, mas não posso responder.",
        "Os cães são animais leais. Eles precisam de comida e ág",
        "* Ferver a água\n* Adicionar as folhas de chá",
        "O mar é azul e o céu também.",
        "Lisboa é a capital de Portugal.",
        "Claro! A água ferve a 100 graus.",
        "“Bom dia”, disse o menino.",
        "OS PÁSSAROS CANTAM DE MANHÃ.",
        "1. Lave a salada.\n2. Corte os tomates.",
        "As árvores perdem as folhas no outono.",
    ],
    "language: en": ["Tea is a drink made from leaves.", "Paella, tortilla and churros are eaten in Spain.", "I don't speak Spanish."],
    "language: ru": ["Чай — это горячий напиток.", "Извините, я не могу ответить."],
    "language: zh": ["茶是一种饮料。", "水在一百度沸腾，变成水蒸气。"],
    "language: ja": ["お茶は飲み物です。", "犬は忠実な動物です。"],
    "language: ko": ["차는 따뜻한 음료입니다.", "개는 충실한 동물입니다."],
    "language: ar": ["الشاي مشروب ساخن يصنع من الأوراق."],
    "language: hi": ["चाय एक गर्म पेय है।"],
    "language: th": ["ชาเป็นเครื่องดื่มร้อน"],
    "language: nl": ["Thee is een warme drank van bladeren."],
    "language: pl": ["Herbata to gorący napój z liści."],
}  # fmt: skip

NOTHING = [
    "",
    " \n\t ",
    "```\n```",
    "```json\n\n```",
    "```json",
    "0```0```0```0```0```0```",
    "river\n```river\n```river\n```river\n```river\n```river\n```",
    "* * * * *",
    "*\n*\n*\n*",
    "- - -\n- - -\n- - -",
    "1.\n2.\n3.\n4.",
    "1. 1. 1. 1. 1. 1.",
    "1 2 3 4 5 6 7 8 9 10",
    "the the the the the the the the",
    "river river river river river river",
    "Tea is hot. Tea is hot. Tea is hot. Tea is hot. Tea is hot.",
    "* Tea is hot.\n* Tea is hot.\n* Tea is hot.\n* Tea is hot.",
    "1. Tea\n2. Tea\n3. Tea\n4. Tea\n5. Tea",
    "AAAAAAAAAAAAAAAAAAAAAAAA",
    "hahahahahahahahahahahaha",
    "abcabcabcabcabcabcabc",
    "oooohnooooohnooooohnooooohnooooohnooooohno",
    "ßßaßßaßßaßßaßßaßßa",
    "I am I am I am I am I am",
    "el té el té el té el té el té el té",
    "el-el-el-el-el-el-el-el",
    '""""""""""""',
    '"a" "a" "a" "a" "a" "a"',
    "{{{{{{{{{{{{",
    "<<<<<<<<>>>>>>>>",
    "<<...>>",
    "... ... ... ...",
    "。。。。。。。。",
    "我喜欢茶我喜欢茶我喜欢茶我喜欢茶我喜欢茶",
    "お茶お茶お茶お茶お茶お茶お茶お茶",
    "ชาชาชาชาชาชาชาชาชาชา",
    "कीकीकीकीकीकीकीकी",
    "😊😊😊😊😊😊😊",
    "\u0301\u0301\u0301\u0301\u0301\u0301",
    "Is there anything else? Is there anything else? Is there anything else?",
]

WRONG = {
    "bullets": [
        "*Eagle*\n*Owl*\n*Fairy*\n*Megagon*\n*Owl*\n*Owl*\n*Owl*\n*Owl*",
        "Tea is a drink made from leaves.",
        "* Tea is a drink made from leaves.",
        "*Tea* is a drink.\n*Milk* is a drink.",
        "**Tea**\n**Milk**\n**Water**",
        "1. Boil the water.\n2. Add the tea.",
        "* Tea\n* Tea\n* Tea",
        "* Tea\n* tea!\n* TEA.",
        "Tea is a drink.\nIt is old.\nIt is hot.\n* Tea is hot.\n* Tea is old.",
        "* Tea * Milk * Water",
        "Answer in bullet points, each beginning with *.",
        '["water", "milk"]',
        "```\n* \n* \n```",
        "Tea - a drink from China - is hot.\nMilk - from cows - is cold.",
        "* Tea\n* Milk\n* Tea\n* Milk\n* Tea",
    ],
    "numbered_list": [
        "1. Mountains form when Earth's crust is broken down into smaller pieces called rocks. 2. Mountains are formed "
        "when Earth's crust is broken down into smaller pieces called rocks. 3. Mountains",
        "Tea is a drink made from leaves.",
        "1. Tea is a drink made from leaves.",
        "1. Boil the water. 2. Add the tea. 3. Wait.",
        "1. Boil the water.\n3. Add the tea.",
        "1. Boil the water.\n1. Add the tea.\n1. Wait.",
        "2. Boil the water.\n3. Add the tea.",
        "* Boil the water.\n* Add the tea.",
        "1. Tea\n2. Tea\n3. Tea",
        "1. Tea\n2. Milk\n3. Tea\n4. Milk\n5. Tea",
        "List three short points, numbered 1., 2., 3.",
        "1.5 litres of water\n2.5 spoons of tea",
        "First, boil the water.\nSecond, add the tea.",
        "It is old.\nIt is hot.\nIt is sweet.\nPoints:\n1. Tea\n2. Milk",
        "1990 was a good year.\n1991 was better.",
        "one. Tea\ntwo. Milk",
    ],
    "json": [
        "{\n  \"type\": \"json\",\n  \"data\": {\n    \"type\": \"json\",\n    \"data\": {\n      \"type\": "
        "\"json\",\n      \"data\": {\n        \"type",
        "```json\n{\n    \"type\": \"json\",\n    \"data\": {\n        \"type\": \"json\",\n        \"data\": {\n      "
        "      \"type\": \"json\",\n            \"data\": {",
        "Tea is a drink.",
        "{'answer': 'Tea is a drink.'}",
        '{"answer": "Tea is a drink."} I hope this helps!',
        'Here is the JSON:\n{"answer": "Tea is a drink."}',
        '{"answer": "Tea is a drink made from the lea',
        '{"answer": "Tea",}',
        "{answer: tea}",
        "{}",
        "[]",
        "[{}]",
        '{"answer": ""}',
        '{"answer": null}',
        '{"answer": {"text": "", "more": []}}',
        '{"answer": "..."}',
        '{"answer": NaN}',
        '"Tea is a drink."',
        "42",
        "true",
        '{"a": "Tea"}\n{"a": "Milk"}',
        "“answer”: “Tea”",
        "{“answer”: “Tea is a drink.”}",
        'Answer as a JSON object with the single key "answer".',
        '```python\nprint({"answer": "tea"})\n```',
    ],
    "title": [
        "<<Sleeping Better: Tips for a Healthier Tomorrow",
        "Tea is a drink made from leaves.",
        "<<Tea",
        "<Tea>\nTea is a drink.",
        "<<...>>\nTea is a drink.",
        "<< >>\nTea is a drink.",
        "<<>>\nTea is a drink.",
        "<<All About Tea>>",
        "**<<All About Tea>>**\n",
        "<<Tea is a drink made from the leaves of a plant, and people drink it hot.>>",
        "«Tea»\nTea is a drink.",
        "# All About Tea\n\nTea is a drink.",
        "Begin with a title in double angular brackets, such as <<My Title>>.",
        "Put a title like <<This Title>> above your answer.",
        "<<All\nAbout Tea>>\nTea is a drink.",
        "[[Tea]]\nTea is a drink.",
    ],
    "poem": [
        "In the realm of chess, where the game of chess is a reflection of the human spirit,\nA tapestry of threads "
        "woven from the very fabric of the game,\nThe game of chess is a",
        "Tea is a drink made from leaves.",
        "The tea is hot, the cup is small, I drink it up, I drink it all.",
        "The tea is hot,\nthe cup is small.",
        "Tea is a drink that has been made for thousands of years in China and in India.\nIt is hot.\nIt is good.",
        "* The tea is hot\n* The cup is small\n* I drink it up",
        "1. The tea is hot\n2. The cup is small\n3. I drink it up",
        "- Water\n- Milk\n- Tea",
        "Water\nMilk\nTea\nCoffee",
        "The tea is hot\nThe tea is hot\nThe tea is hot",
        '{\n  "tea": "It is hot",\n  "cup": "It is small",\n  "all": "I drink it"\n}',
        "| Tea | Hot |\n| --- | --- |\n| Milk | Cold |",
        "```\nThe tea is hot\nThe cup is small\nI drink it up\n```",
        "Write a poem.",
        "Sure, here is a poem for you about the hot tea that we drink every day:\n\nThe tea is hot,\nthe cup is small,\nI drink it all.",
        "The tea is hot,\nthe cup is small,\n\n---\n\nI drink it all.",
    ],
    "quoted": [
        "Tea is a drink.",
        '"Tea is a drink made from the lea',
        'Tea is a drink."',
        'She said: "Tea is a drink."',
        '"Tea" is a drink, and so is "milk"',
        '"Tea is hot," she said. "Milk is cold."',
        "'Tea is a drink.'",
        "‘Tea is a drink.’",
        "`Tea is a drink.`",
        '""',
        '" "',
        '"..."',
        "“Tea is a drink.“ Yes.",
        "«Tea is a drink.”",
        "”Tea is a drink.“",
        '**"Tea is a drink."**',
        '{"answer": "Tea is a drink."}',
        "Write your answer in double quotes.",
    ],
    "capitals": [
        "1. **Materials:**\n- Sand\n- A wooden or metal base\n- A ramp\n- A ramp\n2. **Steps:**\n- Start with a ramp to create the base of",
        "Tea is a drink.",
        "tea is a drink.",
        "TEA is a drink.",
        "TEA IS A DRINK. It is made from leaves.",
        "TEA IS A DRINK\n\nTea Is Hot",
        "Tea Is A Drink",
        "TEA IS A dRINK",
        "100 200 300 400",
        "茶是一种饮料。",
        "茶是一种饮料 A",
        "Sure!\nTEA IS A DRINK.",
        "Answer in capital letters only.",
        "LE THé EST UNE BOISSON",
        "STRAßE UND HAUS",
    ],
    "lower_case": [
        "Tea is a drink.",
        "TEA IS A DRINK.",
        "tea is a drink. It is hot.",
        "tea comes from China.",
        "i like tea and I like milk.",
        "Tea",
        "100 200 300 400",
        "茶是一种饮料。",
        "茶是一种饮料 a",
        "Here is the answer:\ntea is a drink.",
        "Answer in lower case only.",
        "le thé, École",
        "чай — это Напиток",
    ],
    "one_sentence": [
        "Tea is a drink. It is hot.",
        "Tea is a drink made from the leaves of a plant that gro",
        "Tea is a drink",
        "Tea is a drink! Do you like it?",
        "Tea.",
        "It is tea.",
        "Tea is a drink.\nIt is hot.",
        "Tea is a drink.\n\n* It is hot",
        "tea is a drink. it is hot.",
        "Tea is a drink... It is hot and sweet.",
        "“Tea is a drink.” “It is hot.”",
        "There are leaves, herbs, etc. They are put in water.",
        "茶是一种饮料。它很热。",
        "चाय एक पेय है। यह गर्म है।",
        "Tea is a drink. It is",
        "Write a single sentence. Tell me about tea.",
        "All About Tea\n\nTea is a drink made from leaves.",
    ],
    "at_most_words: 12": [
        "1. Build a sand castle using materials like sand, wooden planks, and a large wooden frame.\n2. Use a wooden "
        "frame to create the castle.\n3. Add a wooden ramp to",
        "Tea is a drink that is made from the leaves of a plant in China.",
        "one two three four five six seven eight nine ten eleven twelve thirteen",
        "Tea is a drink.\nIt is hot.\nIt is sweet.\nIt is old.\nIt is cheap.",
        "* Tea is a hot drink\n* Tea comes from China\n* Tea is good for you",
        "Tea – a drink – is made – of leaves – and it – is drunk – hot – every – day",
        '{"answer": "Tea is a drink made from leaves and hot water by many people"}',
        "El té es una bebida caliente que se prepara con hojas secas y agua.",
        "茶是一种用茶叶和热水制成的饮料，很受欢迎。",
        "お茶は世界中の人々に飲まれている飲み物です。",
        "ชาเป็นเครื่องดื่มที่ทำจากใบชาและน้ำร้อน",
        "Tea,milk,sugar,lemon,honey,mint,ginger,salt,butter,cream,water,ice,rum",
        "Sure! Here is an answer of at most twelve words: tea is hot.",
        "Use no more than 12 words. Answer in at most 12 words. Tell me about tea.",
    ],
    "at_most_words: 3": ["Tea is a drink.", "1 2 3 4", "Tea, milk, sugar, honey", "* a\n* b\n* c\n* d", "茶很好喝", "I don't know it"],
    "ends_with: Is there anything else?": [
        "Tea is a drink.",
        "Is there anything else?",
        "**Is there anything else?**",
        "Is there anything else? Is there anything else?",
        "Is there anything else? Tea is a drink.",
        "Tea is a drink. Is there anything else? Yes, there is.",
        "Tea is a drink. Is there anything else I can help with?",
        "Tea is a drink. Is there anything",
        "Tea is a drink. Is there something else?",
        "Tea is a drink. Anything else?",
        "Tea is a drink. This there anything else?",
        "Tea is a drink. Is there any thing else?",
        "El té es una bebida. ¿Hay algo más?",
    ],
    "ends_with: That's all, folks": ["That's all, folks", "Tea is hot. That's all", "Tea is hot. That all folks"],
    "no_comma": [
        "Tea, a drink, is made from leaves.",
        "It costs 1,000 dollars at the shop.",
        "Tea is a drink from China, and people like",
        "Tea",
        "Tea is hot.",
        "Tea is a hot drink.",
        "茶是一种饮料，很受欢迎。",
        "お茶は飲み物で、とても人気です。",
        "الشاي مشروب ساخن، وهو لذيذ جدا في الصباح",
        '{"tea": "It is hot", "milk": "It is cold"}',
        "Sure, here is an answer without any comma.",
        "Tea is hot，milk is cold and water is wet.",
    ],
    "includes: river": [
        "Tea is a drink.",
        "The rivers flow to the sea.",
        "He is the driver of a bus.",
        "They live by the riverside in a house.",
        "river",
        "The river",
        "River.",
        "**River**\n\n",
        "El río fluye hacia el mar.",
        "The r-i-v-e-r flows to the sea.",
        "The stream flows into the riv",
        "Water is important for life.",
        "RIVERS AND LAKES AND SEAS",
        "the_riverbank is a quiet place",
    ],
    "includes: café": ["We met in a cafe in Paris.", "There are many cafés in Paris.", "café"],
    "includes: 河": ["这条江很长。", "河"],
    "includes: green tea": ["I like green and black tea.", "green tea", "The tea is green and hot."],
    "avoids: the": [
        "The sea is blue and it is deep.",
        "Water boils when the heat is high.",
        "TEA IS THE BEST DRINK IN CHINA",
        "Tea is **the** best drink in China.",
        "Tea is _the_ best drink in China.",
        "Tea is “the” best drink in China.",
        "Tea",
        "Tea is hot.",
        "Tea is a hot drink.",
        'Do not use the word "the".',
        "* Tea is hot\n* The cup is small",
        "Tea is a drink from China and\nthe",
        "Tea is made of leaves—the best ones.",
    ],
    "avoids: green tea": ["I like green tea best of all.", "In Japan many people drink Green Tea.", "I like tea."],
    "language: es": [
        "Tea is a drink made from leaves.",
        "Answer in Spanish.",
        "Spanish is a Romance language spoken in Spain and Latin America.",
        "I can answer in Spanish. Tea is a hot drink.",
        "Tea is a very popular bebida in many countries.",
        "Hola! Tea is a drink that is made from leaves.",
        "Sure! Here is the answer in Spanish: El té es una bebida caliente que se prepara con hojas de té.",
        "El té es una bebida caliente. It is made from the leaves of a plant.",
        "O chá é uma bebida quente feita com folhas.",
        "Il tè è una bevanda calda fatta con le foglie.",
        "Le thé est une boisson chaude.",
        "Hola",
        "Gracias",
        "Español",
        "{'language': 'Spanish', 'answer': 'Tea is a drink'}",
        "茶是一种饮料。",
        "I'm sorry, but I don't speak Spanish.",
        "Reply in the Spanish language. Tell me about tea.",
    ],
    "language: fr": [
        "Ce qui l'a fait le kite est le début de le début de le début de le début de le début de le début de le début de le",
        "Tea is a drink made from leaves.",
        "French is a language spoken in France.",
        "Answer in French.",
        "Bonjour",
        "Bonjour! Tea is a drink that people like.",
        "Here is a short answer in French: Le thé est une boisson chaude très appréciée.",
        "Le thé est une boisson chaude. People drink it in the morning.",
        "The croissant and the baguette are eaten in Paris.",
        "El té es una bebida caliente.",
        "Il tè è una bevanda calda.",
        "I'm sorry, I can't answer in French.",
        "Tea is a drink, très bon, and people like it.",
    ],
    "language: de": [
        "Tea is a drink made from leaves.",
        "German is a language spoken in Germany.",
        "Answer in German.",
        "Guten Tag",
        "Hallo! Tea is a drink that people like.",
        "Here is the answer in German: Tee ist ein heißes Getränk aus Blättern.",
        "Tee ist ein heißes Getränk. People drink it in the morning.",
        "Thee is een warme drank van bladeren.",
        "Te er en varm drikk laget av blader.",
        "The kindergarten has a good zeitgeist.",
        "I'm sorry, I can't answer in German.",
        "Tee",
    ],
    "language: it": [
        "In Italian, \"Soddere\" is a word that means \"desert\" in English. It is a place where there is no water.",
        "Tea is a drink made from leaves.",
        "Italian is a language spoken in Italy.",
        "Answer in Italian.",
        "Ciao",
        "Ciao! Tea is a drink that people like.",
        "Here is the answer in Italian: Il tè è una bevanda calda fatta con le foglie.",
        "Il tè è una bevanda calda. People drink it in the morning.",
        "El té es una bebida caliente.",
        "O chá é uma bebida quente.",
        "My favorite food is pizza with mozzarella.",
        "I'm sorry, I can't answer in Italian.",
        "Grazie mille",
    ],
    "language: pt": [
        "Oito tigres emosos emosos emosos emosos emosos emosos emosos emosos emosos emosos emosos emos",
        "E-mail, não parecerávem mais.\n\nE-mail, não parecerávem mais.\n\nE-mail, não",
        "Tea is a drink made from leaves.",
        "Portuguese is a language spoken in Portugal and Brazil.",
        "Answer in Portuguese.",
        "Olá",
        "Olá! Tea is a drink that people like.",
        "Here is the answer in Portuguese: O chá é uma bebida quente feita com folhas.",
        "O chá é uma bebida quente. People drink it in the morning.",
        "El té es una bebida caliente que se prepara con hojas.",
        "Il tè è una bevanda calda fatta con le foglie.",
        "Obrigado",
        "I'm sorry, I can't answer in Portuguese.",
        "The caipirinha is a drink from Brazil.",
    ],
    "language: en": ["El té es una bebida.", "Le thé est chaud.", "Tee ist ein heißes Getränk."],
    "language: ru": ["Чай — це гарячий напій.", "Tea is a drink."],
    "language: zh": ["お茶は飲み物です。", "Tea is a drink.", "茶"],
    "language: ja": ["茶是一种饮料。", "Tea is a drink."],
    "language: nl": ["Tee ist ein heißes Getränk.", "Tea is a drink."],
}  # fmt: skip

FORMATS = ivl.load_tasks(group="formats")
BUILT_IN = set(CHECKS)  # before other tests register theirs
USED = sorted({task.check for task in FORMATS.values()})
EVERY = sorted({*USED, *RIGHT})


def cases(answers):
    return [
        pytest.param(check, text, id=f"{check}-{i}") for check, texts in answers.items() for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("check, text", cases(RIGHT))
def test_right_answers_pass(check, text):
    assert passes(check, text) and passes(check, text, loose=True)


@pytest.mark.parametrize("check, text", cases(WRONG))
def test_wrong_answers_do_not_pass(check, text):
    assert not passes(check, text)


@pytest.mark.parametrize("text", NOTHING)
def test_texts_that_say_nothing_meet_no_check(text):
    assert not [check for check in EVERY if passes(check, text) or passes(check, text, loose=True)]


def test_every_check_is_tried_on_ten_right_and_ten_wrong_answers():
    for answers in (RIGHT, WRONG):
        names = {check: check.partition(":")[0] for check in answers}
        for check in {*USED, *BUILT_IN}:
            texts = [text for c, some in answers.items() if check in (c, names[c]) for text in some]
            assert len(set(texts)) >= 10, check


@pytest.mark.parametrize("sure", ["Sure! Here is your answer:", "Of course.", "**Answer**"])
def test_an_intro_line_is_forgiven_only_loosely(sure):
    for check, answer in {
        "json": '{"answer": "Tea is a drink."}',
        "quoted": '"Tea is a drink."',
        "capitals": "TEA IS A DRINK.",
        "lower_case": "tea is a drink.",
        "one_sentence": "Tea is a drink from China.",
        "at_most_words: 4": "Tea is a drink.",
    }.items():
        text = f"{sure}\n\n{answer}"
        assert not passes(check, text) and passes(check, text, loose=True), check


@pytest.mark.parametrize(
    "check, text",
    [
        ("ends_with: That is all.", "Tea is a drink. That is all.\nI hope this helps!"),
        ("json", '{"answer": "Tea"}\nI hope this helps!'),
        ("quoted", '**"Tea is a drink."**'),
        ("language: es", "Here is a short answer in Spanish:\nEl té es una bebida caliente."),
        ("no_comma", "Sure, here it is:\nTea is a drink made from leaves."),
        (
            "poem",
            "Here is a poem for you about the tea that I drink every day:\nThe tea is hot\nThe cup is small\nI drink it up",
        ),
        ("json", '{"answer": "Tea is a drink made from the lea'),
        ("json", '{"answer": "Tea", "made": {"of": ["leaves", "wat'),
        ("json", '{"answer": "Tea is a drink", "col'),
        ("json", '```json\n{"name": "tea", "facts": [{"text": "She said \\"hot'),
    ],
)
def test_frames_asterisks_and_cut_off_json_are_forgiven_only_loosely(check, text):
    assert not passes(check, text) and passes(check, text, loose=True)


@pytest.mark.parametrize(
    "check, text",
    [
        ("json", "{"),
        ("json", '{"answer": "'),
        ("json", '{"answer": '),
        ("json", '{"ans'),
        ("json", "{'answer': 'Tea"),
        ("json", "Tea {is} a [drink"),
        ("json", '{"answer": "Tea"}, and so on, ['),
        ("capitals", '{"TEA": "HOT", "Mi'),
        ("quoted", '"Tea is a drink made from the lea'),
        ("language: es", "Tea is a drink.\nIt is made from leaves.\nAdiós, amigo mío.\nIt is hot."),
        ("bullets", "* Tea\nis a drink\nfrom China"),
        ("at_most_words: 3", "Tea is a drink.\nIt is very hot.\nIt is very old."),
    ],
)
def test_loose_forgives_no_more_than_that(check, text):
    assert not passes(check, text, loose=True)


# -- names and arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check, message",
    [
        ("bulets", "check 'bulets' is unknown; .*bullets.*, or add yours with register_check"),
        ("languages: es", "check 'languages' is unknown; .*language"),
        ("", "check '' is unknown"),
        (": es", "check '' is unknown"),
        ("Bullets", "check 'Bullets' is unknown; .*bullets"),
        ("bullets: 3", "check 'bullets' takes no argument, but got '3'"),
        ("language", "check 'language' needs an argument, such as 'language: …'"),
        ("language:  ", "check 'language' needs an argument"),
        (
            "language: spanish",
            "check 'language: spanish' names a language that isn't told apart; choose one of ar, cs, ",
        ),
        ("language: ES", "choose one of ar, cs, "),
        ("at_most_words", "check 'at_most_words' needs an argument"),
        ("at_most_words: 0", "check 'at_most_words: 0' needs a whole number of words, 1 or more"),
        ("at_most_words: -3", "needs a whole number of words, 1 or more"),
        ("at_most_words: 2.5", "needs a whole number of words, 1 or more"),
        ("at_most_words: twelve", "needs a whole number of words, 1 or more"),
        ("includes: !", "check 'includes: !' needs a word after the colon"),
        ("avoids: …", "needs a word after the colon"),
        ("ends_with: ?", "needs a word after the colon"),
    ],
)
def test_unknown_checks_and_wrong_arguments_are_named(check, message):
    for ask in (parse_check, check_source, lambda c: passes(c, "Tea is a drink.")):
        with pytest.raises(ValueError, match=message):
            ask(check)


def test_white_space_and_colons_around_an_argument_are_no_matter():
    assert parse_check("language:es") == parse_check("  language :  es ") == (CHECKS["language"], "es")
    assert parse_check("ends_with: Note: that is all.")[1] == "Note: that is all."
    assert parse_check("bullets") == (CHECKS["bullets"], None)
    assert passes("ends_with: Note: that is all.", "Tea is hot. Note: that is all.")


@pytest.fixture
def own(monkeypatch):
    """Checks registered here are gone afterwards."""
    monkeypatch.setattr(checks, "CHECKS", dict(CHECKS))
    return register_check


def test_checks_of_ones_own_with_and_without_argument(own):
    @own("shouts")
    def shouts(text):
        return text.endswith("!")

    @own("starts_with")
    def starts_with(text: str, start: str) -> bool:
        return text.startswith(start)

    assert passes("shouts", " Tea is hot! ") and not passes("shouts", "Tea is hot.") and not passes("shouts", "!!!")
    assert passes("starts_with: # ", "# Tea\nTea is hot") and not passes("starts_with: #", "Tea is hot")
    assert not passes("starts_with: Tea", "**Tea**") and passes("starts_with: Tea", "**Tea**", loose=True)
    assert "text.startswith(start)" in check_source("starts_with: x") != check_source("shouts")
    with pytest.raises(ValueError, match="check 'shouts' takes no argument, but got 'x'"):
        passes("shouts: x", "Tea is hot!")
    with pytest.raises(ValueError, match="check 'starts_with' needs an argument"):
        passes("starts_with", "Tea is hot!")
    with pytest.raises(ValueError, match=r"check 'shout' is unknown; .*shouts"):
        passes("shout", "Tea is hot!")
    records = [{"input": f"Tell me about {n}.", "check": "shouts"} for n in range(10)]
    assert ivl.Task.from_records(records, name="loud", instruction="Shout.").check == "shouts"


def test_a_check_of_ones_own_replaces_another_and_its_source_tells(own):
    own("mine")(lambda text: "tea" in text)
    before = check_source("mine")
    own("mine")(lambda text: "milk" in text)
    assert passes("mine", "hot milk") and not passes("mine", "hot tea") and check_source("mine") != before


@pytest.mark.parametrize("name", ["", "two words", "a:b", "-"])
def test_names_that_are_none_are_refused(own, name):
    with pytest.raises(ValueError, match=re.escape(f"name={name!r} is no name for a check")):
        own(name)(len)
    assert name not in checks.CHECKS


def test_a_check_that_raises_is_named_with_the_beginning_of_the_answer(own):
    @own("broken")
    def broken(text):
        return 1 / 0

    answer = "Tea is a drink made from leaves, and " + "people drink it in many different countries. " * 3 + "THE END"
    for loose in (False, True):
        with pytest.raises(RuntimeError, match=r"check 'broken' raised ZeroDivisionError .* 'Tea is a drink") as error:
            passes("broken", answer, loose=loose)
        assert "THE END" not in str(error.value) and isinstance(error.value.__cause__, ZeroDivisionError)
    assert not passes("broken", " "), "there is no answer to look at"


# -- properties ---------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            "* ",
            "- ",
            "1. ",
            "2. ",
            "\n",
            "{",
            "}",
            "[",
            "]",
            '"',
            ":",
            ",",
            "<<",
            ">>",
            "```",
            "```json",
            "“",
            "”",
            ". ",
            "**",
        ),
        *(
            "tea",
            "The ",
            "river",
            " is",
            "TEA",
            "é",
            "茶",
            "ก",
            "़",
            "\\",
            "\ud800",
            "0",
            "Is there anything else?",
            " el té",
        ),
    ]
)
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=25).map("".join))
TOKENS = st.one_of(st.text(min_size=1, max_size=8), st.lists(PIECES, min_size=1, max_size=3).map("".join))


@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
@pytest.mark.slow
def test_any_text_is_judged_and_strict_implies_loose(text):
    for check in EVERY:
        strict, loose = passes(check, text), passes(check, text, loose=True)
        assert type(strict) is bool and type(loose) is bool
        assert loose or not strict, check


@given(token=TOKENS, n=st.integers(6, 40), between=st.sampled_from(["", " ", "\n", ", ", "\n\n* ", "-"]))
@settings(max_examples=300, deadline=None)
@pytest.mark.slow
def test_one_token_over_and_over_meets_no_check(token, n, between):
    text = between.join([token] * n)
    assert not [check for check in EVERY if passes(check, text) or passes(check, text, loose=True)]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "1" * 10_000, "(" * 9_999, "* a\n" * 5_000, "tea! " * 9_999]
)
@pytest.mark.slow
def test_endless_texts_are_judged_too(text):
    assert not [check for check in EVERY if passes(check, text) or passes(check, text, loose=True)]


@pytest.mark.slow
def test_checks_are_pure():
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()
    asked = [
        (check, text) for answers in (RIGHT, WRONG) for texts in answers.values() for text in texts for check in EVERY
    ]
    first, again = ([passes(*one) for one in asked] for _ in range(2))
    assert first == again and any(first) and not all(first)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


# -- tasks with a check -------------------------------------------------------------------------------------------------

QUESTIONS = [f"Tell me about the number {n}." for n in range(20)]


def write(path, rows):
    names = list(rows[0])
    if path.suffix == ".csv":
        lines = [",".join(f'"{row[name]}"' for name in names) for row in [dict(zip(names, names)), *rows]]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def everything(task):
    return [x for split in SPLITS for x in task.split(split)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_with_a_check_in_each_row_becomes_a_task(tmp_path, kind):
    rows = [{"input": q, "instruction": "Answer in Spanish.", "check": "language: es"} for q in QUESTIONS]
    task = ivl.Task.from_file(write(tmp_path / f"spanish.{kind}", rows))
    assert (task.name, task.instructions, task.check, task.is_checked) == (
        "spanish",
        ("Answer in Spanish.",),
        "language: es",
        True,
    )
    assert (len(task.train), len(task.valid), len(task.test)) == (10, 3, 7)
    assert {x.output for x in everything(task)} == {""} and {x.check for x in everything(task)} == {"language: es"}
    assert "'language: es'" in repr(task) and set(task.to_dataframe()["check"]) == {"language: es"}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_may_have_different_checks_and_splits(tmp_path, kind):
    forms = [("Answer in Spanish.", "language: es"), ("Use at most 5 words.", "at_most_words: 5")]
    splits = ["train", "train", "dev", "test"]
    rows = [
        {"input": q, "instruction": forms[i % 2][0], "check": forms[i % 2][1], "split": splits[i // 2 % 4]}
        for i, q in enumerate(QUESTIONS)
    ]
    task = ivl.Task.from_file(write(tmp_path / f"forms.{kind}", rows))
    assert task.check is None and task.is_checked
    assert {x.input: (x.instruction, x.check) for x in everything(task)} == {
        row["input"]: (row["instruction"], row["check"]) for row in rows
    }
    for split in SPLITS:
        names = {"valid": ("dev",)}.get(split, (split,))
        assert [x.input for x in task.split(split)] == [row["input"] for row in rows if row["split"] in names]
    for prompt in build_prompts(task, instruction=True, split="test"):
        assert (prompt.instruction, prompt.query.check) in forms


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_output_beside_a_check_is_kept_and_needed_without_one(tmp_path, kind):
    rows = [
        {"input": q, "output": "Twenty." if i % 2 else "", "check": "at_most_words: 5"} for i, q in enumerate(QUESTIONS)
    ]
    task = ivl.Task.from_file(write(tmp_path / f"short.{kind}", rows), instruction="Be short.")
    assert {x.input: x.output for x in everything(task)} == {row["input"]: row["output"] for row in rows}
    rows = [{**row, "check": ""} for row in rows]
    with pytest.raises(ValueError, match=rf"(line|record) [12] of .*short.{kind} of task 'short' has no 'output'"):
        ivl.Task.from_file(write(tmp_path / f"short.{kind}", rows), instruction="Be short.")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_with_and_without_a_check_are_refused(tmp_path, kind):
    rows = [
        {"input": q, "output": "Yes.", "check": "" if i < 3 else "at_most_words: 5"} for i, q in enumerate(QUESTIONS)
    ]
    path = write(tmp_path / f"mixed.{kind}", rows)
    with pytest.raises(
        ValueError, match="3 of 20 records of task 'mixed' have no 'check', the others have one; give each"
    ):
        ivl.Task.from_file(path, instruction="Be short.")
    task = ivl.Task.from_records(rows, name="mixed", instruction="Be short.", check="no_comma")
    assert task.check == "no_comma", "one for all stands over the records' own"


@pytest.mark.parametrize("kind, line", [("csv", 4), ("jsonl", 3)])
@pytest.mark.parametrize(
    "check, message",
    [("bulets", "'bulets' is unknown; .*bullets"), ("at_most_words: 0", "needs a whole number of words")],
)
def test_an_unknown_check_names_file_and_row(tmp_path, kind, line, check, message):
    rows = [{"input": q, "check": check if i == 2 else "bullets"} for i, q in enumerate(QUESTIONS)]
    with pytest.raises(ValueError, match=rf"line {line} of .*points.{kind} of task 'points': check .*{message}"):
        ivl.Task.from_file(write(tmp_path / f"points.{kind}", rows), instruction="Use bullet points.")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_column_of_checks_may_have_another_name(tmp_path, kind):
    rows = [{"question": q, "verifier": "bullets"} for q in QUESTIONS]
    path = write(tmp_path / f"points.{kind}", rows)
    columns = {"input": "question", "check": "verifier"}
    task = ivl.Task.from_file(path, instruction="Use bullet points.", columns=columns)
    assert task.check == "bullets" and len(task) == 20
    with pytest.raises(ValueError, match="has no 'output'; it has question, verifier: name your columns"):
        ivl.Task.from_file(path, instruction="Use bullet points.", columns={"input": "question"})


def test_tasks_without_a_check_have_none():
    task = ivl.load_tasks("antonym")["antonym"]
    assert task.check is None and not task.is_checked


def test_held_out_wordings_are_asked_on_the_test_split_only():
    for task in FORMATS.values():
        for split in SPLITS:
            prompts = build_prompts(task, instruction=True, split=split)
            wordings = task.held_out if split == "test" else task.instructions
            assert {prompt.instruction for prompt in prompts} == set(wordings), (task.name, split)
    plain = ivl.Task.from_records(
        [{"input": q, "check": "bullets"} for q in QUESTIONS], name="t", instruction="Points."
    )
    assert {prompt.instruction for prompt in build_prompts(plain, instruction=True, split="test")} == {"Points."}
    prompts = build_prompts(task, instruction=len(task.instructions), split="train", n=3)
    assert {prompt.instruction for prompt in prompts} == {task.held_out[0]}, "by its number, any wording on any split"
    assert {prompt.instruction for prompt in build_prompts(task, split="test", n=3)} == {None}


# -- the built-in format tasks ------------------------------------------------------------------------------------------


def test_there_are_enough_format_tasks_and_none_among_the_others():
    assert len(FORMATS) >= 14 and {check.partition(":")[0] for check in USED} == BUILT_IN
    for task in FORMATS.values():
        assert task.group == "formats" and task.description and task.is_checked and task.check in USED
    assert not set(FORMATS) & set(ivl.load_tasks())


def test_every_format_task_has_enough_wordings_of_its_own():
    wordings = [wording for task in FORMATS.values() for wording in (*task.instructions, *task.held_out)]
    assert len({wording.casefold() for wording in wordings}) == len(wordings), "none is shared"
    for task in FORMATS.values():
        assert len(task.instructions) + len(task.held_out) >= 6 and len(task.held_out) >= 2, task.name
    assert all(wording == wording.strip() and len(wording) > 8 for wording in wordings)


def test_format_tasks_ask_the_same_questions_in_the_same_splits():
    first, *others = FORMATS.values()
    asked = {split: [x.input for x in first.split(split)] for split in SPLITS}
    for task in others:
        assert {split: [x.input for x in task.split(split)] for split in SPLITS} == asked, task.name
    questions = [ivl.tasks.task.plain_text(question) for split in SPLITS for question in asked[split]]
    assert len(questions) >= 120 and len(set(questions)) == len(questions)
    assert min(map(len, asked.values())) >= 30


def test_no_question_stands_in_another_task():
    questions = {x.input.casefold().strip(" .?") for x in everything(next(iter(FORMATS.values())))}
    for task in ivl.load_tasks().values():
        for x in everything(task):
            texts = [text.casefold() for text in (x.input, x.output, x.question or "", x.content or "")]
            assert not [question for question in questions if any(question in text for text in texts)], (task.name, x)


def test_no_wording_and_no_question_meets_a_form_by_itself_that_it_does_not_have():
    """An echo of what was asked isn't an answer: only where the words themselves are of the form."""
    told = ("one_sentence", "short", "closing", "no_comma", "includes_river", "avoids_the", "capitals")
    for task in FORMATS.values():
        for wording in (*task.instructions, *task.held_out):
            if task.name not in told:
                assert not passes(task.check, wording), (task.name, wording)


def test_one_check_for_a_whole_file(tmp_path):
    path = write(tmp_path / "plain.jsonl", [{"input": q} for q in QUESTIONS])
    task = ivl.Task.from_file(path, instruction="Be short.", check="at_most_words: 5")
    assert task.check == "at_most_words: 5"


def test_free_answers_are_shown_as_demonstrations_where_there_are_some():
    records = [{"input": q, "output": "Yes." if i % 2 else ""} for i, q in enumerate(QUESTIONS)]
    task = ivl.Task.from_records(records, name="short", instruction="Be short.", check="at_most_words: 5")
    for prompt in build_prompts(task, shots=2):
        assert [x.output for x in prompt.demonstrations] == ["Yes.", "Yes."]
    bare = ivl.load_tasks("bullets")["bullets"]
    with pytest.raises(ValueError, match=r"shots=10, but the answers of task 'bullets' are free.*pass shots=0"):
        build_prompts(bare, shots=10)


def test_checks_gates_and_tables_of_answers_stand_at_the_top_level():
    for name in ("passes", "register_check", "Gate", "fit_gate", "Generations"):
        assert name in ivl.__all__ and getattr(ivl, name).__name__ == name
    assert ivl.passes("bullets", "* one thing\n* another")


@pytest.mark.parametrize("text", ["ខ្ញុំចូលចិត្តញ៉ាំបាយ", "ฉันชอบกินข้าวผัด", "ຂ້ອຍມັກກິນເຂົ້າ", "ကျွန်တော်ထမင်းစားချင်တယ်", "我喜欢吃米饭"])
def test_a_sentence_without_spaces_is_more_than_a_word(text):
    assert not passes("at_most_words: 3", text) and passes("at_most_words: 30", text)
