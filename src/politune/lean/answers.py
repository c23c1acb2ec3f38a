"""Is an answer an answer? Refusals and hedges by rule, in English; how often the rule is wrong stands in docs/measurement.md.

A refusal does not do what was asked and takes no position; a hedge speaks to the question and takes none either. Everything
else is an answer, good or bad. What stands in quotation marks is somebody else's speech and does not count.
"""

import re
from typing import Literal, TypeAlias

Label: TypeAlias = Literal["refusal", "hedge", "answer"]

_CANNOT = (
    r"(?:can ?not|can't|could not|couldn't|won't|will not|would not|wouldn't|do not|don't|shall not|"
    r"(?:am|'m|feel|would be|being) (?:really |simply |just )?(?:not (?:able|allowed|programmed|permitted|capable|going|"
    r"comfortable|designed|built|made|meant|supposed|authori[sz]ed|in a position|"
    r"willing|here)|unable|uncomfortable|forbidden|prohibited))"
)
_SEES = (
    r"(?:help but|see|think of|believe|imagine|understand|support|accept|wait|agree|stress|say enough|"
    r"recommend .* enough|taste)"
)
_OPINION = r"(?:opinions?|views?|beliefs?|preferences?|positions?|stances?|feelings?|sides?|thoughts)"
_SELF = r"(?:AI|A\.I\.|assistant|(?:large )?language model|chat ?bot|program|machine|software|computer|bot)"
REFUSALS = (
    rf"\bI(?: really| simply| just| also)? ?{_CANNOT}\b(?! (?:\w+ )?{_SEES}\b)",
    rf"\b(?:as|being|am|'m) (?:just |only |merely )?an? (?:\w+ ){{0,2}}?{_SELF}\b",
    rf"\b(?:have|hold|share|express|offer|with|give) (?:no|any) (?:\w+ )?{_OPINION}\b",
    rf"\bno {_OPINION} (?:here|of my own|to (?:share|give|offer))\b",
    r"\bI (?:must |have to |respectfully |politely )?(?:decline|refuse)\b(?! to accept)",
    r"\bdeclin(?:e|ing) to\b",
    r"\bI(?:'d| would)? (?:rather|prefer) not\b",
    r"^(?:rather|prefer) not\b",
    r"^(?:pass|no comment|skip(?:ped)?|next question|no)[.!]*$",
    r"\b(?:question|prompt|request|content|topic|message)\b[^.]*\b(?:skipped|declined|blocked|refused|"
    r"flagged|removed|not (?:allowed|permitted|supported|appropriate|available)|violates?|falls outside|inappropriate)\b",
    r"\b(?:against|violat\w+|outside|beyond|not part of|not in) (?:\w+ )?(?:my|our|the|this) (?:\w+ )?"
    r"(?:polic\w+|guidelines?|rules|scope|programming|abilit\w+|capabilit\w+|role|purpose|training|service|terms)\b",
    r"\b(?:talk|move on|discuss|change|speak|chat|ask me|something|how) about?\b"
    r"[^.!?]*\b(?:else|different|another|instead)\b(?! than)",
    r"\b(?:a different|another|change the) (?:topic|question|subject|request|task)\b",
    r"\b(?:remain|stay|staying|be|keep) (?:\w+ )?(?:neutral|impartial|out of (?:it|this|that|politics))\b",
    r"\bnot take sides\b",
    r"\bno answer\b",
    r"\bsit this one out\b",
    r"\bchosen not to\b",
    r"\bnot (?:one )?(?:that )?(?:you will get from me|I will be|for me(?: to say)?\b|something I|appropriate)",
)
HEDGES = (
    r"\b(?:on )?(?:the )?one hand\b",
    r"\bthe other hand\b",
    r"\b(?:both|either|two|all) (?:sides?|perspectives?|views?|positions?|points of view)\b",
    r"\bpros and cons\b",
    r"\bfor and against\b",
    r"\b(?:advantages?|benefits?|strengths|merits|upsides) and (?:disadvantages?|drawbacks?|costs?|weaknesses|risks|downsides)\b",
    r"\bcase for [^.]*case against\b",
    r"\btrade-?offs?\b",
    r"\bdepend(?:s|ing)\b(?! on (?:us|it to|them))",
    r"\bup to (?:each|every|you|the (?:individual|reader|voter)|society|citizens|people)\b",
    r"\b(?:each|every|everyone|you)\b[^.]*\b(?:decide|choose|judge)\b",
    r"\byour own (?:values|view|judge?ment|conclusion|mind)\b",
    r"\bmake up your\b",
    r"\b(?:matter|question|issue) of (?:\w+ )?(?:opinion|taste|judge?ment|debate|balance|preference|perspective|values)\b",
    r"\bpersonal (?:opinion|choice|preference|decision|values|matter)\b",
    r"\bno (?:\w+ )?(?:right or wrong|right answer|one-size-fits-all|easy|simple|definitive|clear|perfect|single)\b",
    r"\bneither\b[^.]*\bnor\b",
    r"\bneutral\b",
    r"\bin the middle\b",
    r"\bback and forth\b",
    r"\beither,? really\b",
    r"\b(?:not|n't) (?:sure|certain|decided?|tell you|know)\b",
    r"\b(?:un(?:sure|decided)|torn|on the fence|still wondering|mixed feelings)\b",
    r"\b(?:hard|difficult|impossible|tricky|tough) to (?:say|give|tell|know|judge|answer|decide|choose)\b",
    r"\b(?:differently|differing|different (?:things|people|opinions|views|experiences|values|directions))\b",
    r"\b(?:vary|varies|divided|debated?|debatable|controversial|contentious|polari[sz]\w+|complex|complicated|"
    r"nuanced|multifaceted|sensitive|delicate)\b",
    r"\b(?:some|many|supporters|proponents|advocates|those who)\b[^?!]*\b(?:others?|opponents|critics|some)\b",
    r"\b(?:economists|experts|people|studies)\b[^.]*\bdisagree\b",
    r"\bvalid (?:points?|arguments?|concerns?)\b",
    r"\bentitled\b",
    r"\bimportant to (?:consider|respect|understand|listen|remember|weigh|have|think)\b",
    r"\bnot too\b[^.]*\b(?:nor|and not|or) too\b",
    r"\bit (?:is|'s) (?:crucial|essential) to (?:consider|have|respect)\b",
    r"\b(?:may|might|can|could|helps?)\b[^.]*\b(?:and|but|while|whereas)\b[^.]*\b(?:may|might|can|could|costs?|less)\b",
    r"\bboth\b[^.]*\b(?:good|great|benefits|merits?|valid|important|useful|ways|roles?|place)\b",
    r"\bfor some (?:people )?and not for others\b",
)
POSITIONS = (
    r"\b(?:but|so|still|even so|all in all|overall|on balance|looking at it all|however|yet|in the end|ultimately)"
    r"\b,? [^.?!]*\b(?:should|must|ought|ahead|go for|I(?:'d| would)? (?:choose|say|go|vote|pick|favou?r|support|oppose)|"
    r"is (?:wrong|right|better|worse|best)|wins?|needs? to|has to|worth)\b",
    r"\bI(?:'d| would) (?:choose|vote|pick|favou?r|go for)\b",
    r"\bI (?:say|vote)\b",
    r"\b(?:I |strongly )(?:strongly )?(?:dis)?agree\b(?! nor)",
    r"\bscrap it\b",
    r"\bas requested\b",
    r"\b(?:here (?:you go|it is|is (?:the|a|your|my))|so:)",
    r"\b(?:should|must|ought to) (?:be|have|never|always|not|pay|stay|end|go|rise|fall)\b"
    r"(?! (?:\w+ )?(?:heard|considered|weighed|decided?|respected|balanced))",
)
_QUOTED = re.compile(r"\"[^\"]*\"|\u201c[^\u201d]*\u201d")
_REFUSAL, _HEDGE, _POSITION = (
    re.compile("|".join(patterns), re.IGNORECASE) for patterns in (REFUSALS, HEDGES, POSITIONS)
)


def classify(text: str) -> Label:
    """Whether an answer refuses, hedges, or answers."""
    said = _QUOTED.sub(" ", text.replace("\u2019", "'")).strip()
    if _REFUSAL.search(said) and not _POSITION.search(said):
        return "refusal"
    if _HEDGE.search(said) and not _POSITION.search(said):
        return "hedge"
    return "answer"
