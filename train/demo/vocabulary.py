"""The words and sentence templates of the demo corpus; `demo.py` turns them into messages.

Everything here was written for this project: invented shops, venues, products and titles, common first
names, real city names, `.example` addresses and 555-01xx phone numbers (both reserved for fiction).

A template names its slots in braces, `{person}`; a trailing number asks for another value of the same kind,
`{person2}`. Templates on one line are separated by `|`, as are the words of a list. Literal text never
names an entity: a date or a product written outside a slot would carry no tag.
"""

# Open-class words, by kind. No word of one part occurs in the other, so that what an app learns about a name
# cannot come from having met it during pre-finetuning. Weekdays, months, clock times and amounts are closed
# classes: `demo.py` writes them by rule, the same in both parts.
PRETRAIN_WORDS: dict[str, str] = {
    "first_name": "Maya|Liam|Priya|Noah|Elena|Omar|Sofia|Ethan|Aisha|Lucas|Hannah|Mateo|Chloe|Ravi|Nora"
    "|Felix|Zoe|Ivan|Leila|Oscar|Tessa|Kwame|Ingrid|Diego|Yuki|Bella|Marcus|Anya|Theo|Fatima|Gavin|Wren"
    "|Dmitri|Paula|Samir|Heidi|Colin|Rosa|Jamal|Vera|Peter|Lucia|Hassan|Molly|Arjun|Freya|Kofi|Simone|Victor"
    "|Nadia|Joel|Amara|Tobias|Carmen|Ming|Audrey|Rafael|Stella|Bruno|Daphne",
    "last_name": "Okafor|Lindqvist|Moreau|Tanaka|Petrov|Alvarez|Hughes|Nakamura|Brennan|Costa|Iyer|Novak"
    "|Schmidt|Rahman|Doyle|Fischer|Mbeki|Larsen|Romano|Chowdhury|Whitfield|Santos|Kowalski|Barrett|Nguyen"
    "|Haddad|Sinclair|Volkov|Mendez|Osei",
    "city": "Lisbon|Denver|Osaka|Nairobi|Dublin|Toronto|Seville|Austin|Bergen|Krakow|Lima|Mumbai|Seattle"
    "|Porto|Vienna|Hanoi|Chicago|Bristol|Naples|Accra|Boston|Zurich|Perth|Oslo",
    "place_name": "Harbor|Linden|Maple|Larkspur|Kingsway|Fairview|Old Mill|Cedar|Riverside|Hollis|Northgate"
    "|Summit|Beacon|Whitmore|Canal|Foxglove|St Anne|Lakeshore",
    "place_head": "Station|Park|Library|Mall|Gym|Square|Museum|Stadium|Theater|Cafe",
    "venue": "Blue Fig|Noodle Barn|Casa Verde|Golden Wok|Pepper House|Little Saigon|Taverna Mira|Smoke Shack"
    "|Bombay Spoon|La Cantina|Ember Grill|Olive Branch|Green Bowl|Trattoria Sole|Crab Hut|Sakura Corner",
    "hotel": "Hotel Miramar|Birchwood Inn|Seaview Lodge|Hotel Aurora|Pine Cone Hostel|Grand Meridian"
    "|Villa Palma|Bluebell Guesthouse|Hotel Sant Pau|Stonebridge Suites",
    "shop": "Brightcart|Homewell|Tally and Co|Pixel Depot|Freshway|Corner Drug|Garden Nook|Sportiva Plus"
    "|Bookaroo|Dollar Barn|Ubuy Direct|Needle Works",
    "org": "Axion Labs|Bluepeak|Corvid Systems|Delmar Foods|Eastbrook Bank|Finch Media|Greywater"
    "|Helix Health|Ironwood|Hazel Law|Lattice Energy|Mosaic Travel|Parallel Design|Tern Logistics",
    "brand": "Kestrel|Lumo|Northpine|Velta|Tarn|Brightline|Quillon|Aster|Zephyr|Hallmere|Pikko|Oakdale",
    "item": "headset|backpack|kettle|rain jacket|phone case|desk lamp|yoga mat|coffee grinder|keyboard"
    "|toaster|water bottle|bike helmet|sleeping bag|cutting board|smart watch|monitor|sweater|suitcase"
    "|tripod|webcam|blender|office chair|hair dryer|board game|power bank|wallet|umbrella|camping stove"
    "|bookshelf|wool scarf",
    "model": "X2|Mini|Go|Pro 3|Air|K40|Classic",
    "dish": "pad thai|lasagna|chicken curry|mushroom risotto|ramen|paella|falafel|bibimbap|shakshuka|gumbo"
    "|pho|lentil soup|goulash|jollof rice|biryani|ratatouille|moussaka|chili|apple pie|tofu stew"
    "|mac and cheese|beef stew|pizza|sushi|couscous salad|potato salad|fried rice|cornbread|pumpkin soup"
    "|banana bread",
    "grocery": "milk|rice|butter|flour|sugar|bread|cheese|yogurt|spinach|olive oil|garlic|oat milk|honey"
    "|pasta|ginger|peanut butter|orange juice|salt|basil|tofu",
    "media": "Paper Lanterns|Midnight Ferry|The Glass Orchard|Slow Comet|Winter in Motion|Nine Quiet Rooms"
    "|The Last Cartographer|Salt and Neon|Borrowed Thunder|Echo Valley|A Map of Rain|Static Hearts"
    "|Velvet Tide|The Beekeeper's Son|Crooked Moon|Dust and Daylight|Hollow Kings|Signal Fires|Yellow Kite"
    "|North of Nowhere|Clockwork Parade|Two Left Shoes|Marble Sky|Ghost Frequency",
    "room": "kitchen|bedroom|living room|bathroom|hallway|garage|study|nursery|basement|dining room",
    "device": "fan|heater|tv|radio|humidifier|night light|sprinkler|dryer|purifier|ceiling light",
    "chore": "take out the trash|water the plants|feed the cat|vacuum the stairs|walk the dog|clean the oven"
    "|mow the lawn|do the laundry|empty the mailbox|sweep the porch|fold the towels|change the sheets",
    "topic": "budget|roadmap|hiring|pricing|marketing|security|onboarding|launch|design|research|support"
    "|audit",
    "trade": "plumber|electrician|window cleaner|painter|gas engineer|locksmith|roofer|gardener",
    "sport": "soccer|swimming|judo|tennis|hockey|ballet|choir|chess|basketball|gymnastics",
    "weather": "rain|snow|fog|hail|a heat wave|thunderstorms|strong wind|black ice",
    "mail": "mail.example|post.example|inbox.example",
    "site": "meet.example|calls.example|rooms.example",
}

APP_WORDS: dict[str, str] = {
    # Several names are also cities, months, flowers or verbs (Charlotte, June, Rose, Mark): only the sentence
    # tells which, as in real messages.
    "first_name": "Grace|Ben|Camila|April|Darius|Charlotte|Esther|Farid|Gita|Will|Hugo|Iris|Jonas|June|Keiko"
    "|Lena|Sydney|Mona|Nils|Mark|Olga|Pablo|Quinn|Rose|Ruth|Selma|Tariq|Uma|Vince|Wanda|Jackson|Yara|Zane"
    "|Alma|Boris|Cleo|Desmond|Edith|Fern|Gustavo|Florence|Imran|Jada|Kirk|Lorna|Malik|Otto|Petra|Rohan|Skye"
    "|Tamsin",
    "last_name": "Abbott|Banerjee|Castillo|Drummond|Eriksen|Fontaine|Goldberg|Hashimoto|Ibarra|Jankowski"
    "|Keane|Lockhart|Marchetti|Nyberg|Oduya|Peralta|Quintero|Rossi|Solberg|Thorne|Underwood|Varga|Winters"
    "|Yilmaz",
    "city": "Madrid|Prague|Charlotte|Kyoto|Cairo|Leeds|Savannah|Quito|Helsinki|Sydney|Portland|Bogota|Geneva"
    "|Phoenix|Manila|Glasgow|Florence|Tampa|Riga|Dakar|Houston|Antwerp|Jackson|Turin",
    "place_name": "Juniper Hill|Bramble|Ashdown|Copperfield|Waverly|Elder Row|Pelham|Jackson|Stonegate|Ivy"
    "|Marlowe|Quayside|Thistle|Violet|Granary|Eastfield|Salisbury|Windmill",
    "place_head": "Plaza|Pier|Arcade|Avenue|Market|Terminal|Hall|Tower|Brasserie|Bakery",
    "venue": "Bistro Lune|Rusty Anchor|Mango Tree|Club Paradiso|Kebab Palace|Sunday Social|Lucky Dumpling"
    "|Twin Oaks|Dock Seven|Fiddler Pub|Moonrise Diner|Sweet April|Ginza Express|Brewery Lane",
    "brand": "Orbix|Fenwick|Solano|Marlo|Tundra|Cobalt|Juno|Vexa|Redfern|Halcyon|Mistral|Pemberly",
    "item": "tablet|charger|router|mattress|tent|sofa|rocking horse|drone|scooter|hoodie|doorbell|printer"
    "|guitar|sewing machine|electric toothbrush|ladder|e-reader|fryer|stroller|necklace|raincoat|cookbook"
    "|microwave|treadmill|projector|skateboard|hedge trimmer|jigsaw|fountain pen|record player",
    "model": "S9|Lite|Max|Duo 5|Edge|Z7|One",
}

# How a message may open, turn to a second subject, and close. Openers and links carry their own space.
PRETRAIN_OPENERS = (
    "Hey {friend}, |Hi {friend}, |{friend}, |Hey, |Hi, |Btw, |Quick one: |Ok so, |Hi all, |Oh, "
)
REPLY_OPENERS = "Hey {sender}, |Hi {sender}, |{sender}, |Hmm, |Oh, "
PRETRAIN_LINKS = "Also, |Oh and |PS: |By the way, "
PRETRAIN_CLOSERS = "Thanks!|Thx!|Lmk.|:)|👍|🙂|Thank you!"
APP_OPENERS = "Yo {friend}, |Dear {friend}, |Listen, |Assistant, |Right, |Uh, |Ok phone, |Well, "
APP_CLOSERS = "Cheers.|Ta.|Much appreciated.|Appreciate it.|😅|🙏"
TC_OPENERS = "Assistant, |Ok phone, |Hello, |Uh, |Right, |Well, |So, |Excuse me, "

# A scene starts with `-`: the ways to say it, all with the same slots; then `>` fitting replies and `=`
# subject lines. A line `@ domain` starts a domain; in a `notice` domain the messages come from a machine, so
# they stay neat and have no greeting.
SCENES = """
@ contacts
- Can you send me {person}'s number? | Do you have a phone number for {person}?
  What's {person}'s cell? I can't find it anywhere. | I lost {person}'s number, could you text it to me?
> Sure, {person} is on {phone}. | Here you go: {person}, {phone} | I only have an email for {person}: {email}
= Phone number for {person} | {person}'s number please
- Please change {person}'s email to {email}. | New address for {person}: {email}
  FYI {person} now uses {email}. | You can reach {person} at {email} from now on.
> Got it, saved {email} for {person}. | Thanks, I updated {person}'s card.
> So {person}'s old address is dead?
= New email for {person} | {person} has a new address
- I met {person} from {org} at the fair, can you follow up?
  Could you write to {person}? We talked at the {org} booth.
  Please reach out to {person} at {org} when you can.
  {person} of {org} wants to hear from us, please get in touch.
> Will do, I'll write to {person} first thing. | I already spoke with {person}, {org} is interested.
> Do you have a card for {person}? I don't know anyone at {org}.
= Follow up with {person} ({org}) | Intro to {person} at {org}
- {person} tried to call you at {time}. | {person} rang at {time} but you didn't pick up.
  You missed a call at {time}, it was {person}. | There was a call from {person} at {time} while you were out.
> Thanks, I'll call {person} back in a bit. | Did {person} leave a voicemail?
> I was driving at {time}, sorry.
= Missed call from {person} | {person} called at {time}
- I think {person} got a new phone, {phone} is what I have now. | {person}'s new number is {phone}, save it.
  Can you store {phone} for {person}? The old one is dead.
  Don't use the old number for {person}, it's {phone} now.
> Saved {phone} for {person}. | Does {person} still have the work phone? | Just tried {phone}, nobody answers.
= New number for {person} | {phone} is {person}
@ calendar
- Lunch with {person} at {place} {date} at {time}?
  {person} and I have lunch at {place} {date}, {time}. Want to come?
  Are you free for lunch at {place} with {person} {date}, say {time}?
  Thinking of lunch {date} with {person}, {time} at {place}. You in?
> I'm in, see you and {person} at {place}. | Can't make {time}, could {person} do {time2}?
> {date} works, I'll get us a table at {place}. | Not {date}, but say hi to {person}!
= Lunch with {person} | Lunch at {place} {date}
- Can we push the {topic} meeting {date} from {time} to {time2}?
  I need to move the {topic} meeting {date}, {time2} instead of {time}.
  The {topic} meeting {date} is at {time2} now, not {time}.
  For {topic} {date}, is {time2} ok? I can't do {time}.
> Sure, {time2} is fine for the {topic} meeting. | {time2} clashes with my dentist, can we keep {time}?
> Moved {topic} to {time2}, invites are out.
= {topic} meeting moved to {time2} | {topic} meeting {date}, new time
- Don't forget {person}'s birthday is on {day}. | On {day} it's {person}'s birthday, remember to call.
  {person} has a birthday on {day}, just so you know.
  We need a present for {person}, the birthday is on {day}.
> Thanks for the reminder, what does {person} like? | I'll bake something for {person}.
> Already got {person} a card for {day}.
= {person}'s birthday | {person} on {day}: presents
- We're all meeting at {place} at {time} {date}, bring {person}!
  {date}, {time}, {place}. You and {person} should come!
  Tell {person} too: everyone is at {place} {date} from {time}.
  Come to {place} {date} at {time} and take {person} along.
> I'll bring {person}, see you at {place}. | Running late, be at {place} by {time2}.
> {person} can't come {date}.
= {place} {date} | Meetup at {place}, {time}
@ travel
- My flight to {city} leaves at {time} {date}. | I'm flying to {city} {date}, we take off at {time}.
  {date} at {time} I'm on the plane to {city}. | Off to {city} {date}! The plane leaves at {time}.
> Safe flight to {city}! See you after. | Need a ride to the airport before {time}?
> Text me when you land in {city}.
= Flight to {city} {date} | Leaving for {city} at {time}
- Booked us a room at {hotel} in {city}, {money} all in.
  We're staying at {hotel} in {city}, it came to {money}. | I paid {money} for a double at {hotel}, {city}.
  The {city} hotel is sorted: {hotel}, {money} for the two of us.
> Nice, does {hotel} do breakfast? | {money} is a steal for {city}. | I'll send you my half of the {money}.
= Room at {hotel} | {city} hotel booked, {money}
- The {time} train to {city} is running {count} minutes late.
  Another {count} minute delay on the {time} to {city}, ugh.
  I'm on the {time} to {city} and we're {count} minutes behind.
  My {time} to {city} leaves {count} minutes late.
> Ok, I'll wait on the platform in {city}. | Can you switch to a bus to {city}?
> {count} minutes is nothing for {city}.
= {time} train to {city} delayed | {city} train, {count} minutes late
- Can you pick me up from {place} at {time}? | Could you get me at {place} around {time}?
  Any chance of a lift home from {place} at {time}? | I'll need a ride from {place}, {time} would be ideal.
> Sure, I'll be outside {place} at {time}. | Stuck in traffic, can you take the bus from {place}?
> I can be at {place} by {time2}, is that ok?
= Ride from {place} | Pickup at {place}, {time}
@ travel notice
- Gate change: flight {code} to {city} now boards at gate {gate}.
  Flight {code} to {city} has moved to gate {gate}. | Please go to gate {gate} for flight {code} to {city}.
  {city} flight {code}: your new gate is {gate}.
> On my way to gate {gate} now. | Thanks, is flight {code} still on time?
> Gate {gate} is miles away, wait for me!
= Gate change for flight {code} | {code} to {city}, gate {gate}
- Your trip to {city} on {day} is confirmed, check in from {time}.
  Check-in for {city} opens on {day} at {time}. | You can check in for {city} from {time} on {day}.
  From {time} on {day}, get your boarding pass for {city} online.
> Checked in for {city}, thanks. | The app won't let me check in for {city}. | Do I need a visa for {city}?
= Check in for {city} | Your trip on {day}
@ shopping
- The {product} I got from {shop} still isn't here. | Still no sign of that {product} from {shop}.
  Has the {product} from {shop} turned up? I'm still waiting.
  {shop} is taking forever to send me the {product}.
> Check your spam, {shop} sends a link. | Mine took ages too, the {product} will show up.
> Maybe a neighbor has your {product}?
= Missing {product} | {shop} parcel is late
- The {product} you wanted is {money} at {shop}. | {shop} has the {product} on sale for {money}.
  Saw the {product} for {money} at {shop}, great price. | Only {money} for the {product} at {shop} right now.
> Buy it, I've wanted that {product} for ages. | {money} is still too much for me.
> Does {shop} ship the {product}?
= {product} for {money} | {shop} sale: {product}
- Thinking of getting {person} the {product} as a gift. | Would {person} like the {product} for a present?
  Gift idea for {person}: the {product}. | Could the {product} be something for {person}'s birthday?
> {person} already has one, sadly. | Perfect, {person} keeps talking about the {product}.
> What's the {product} like?
= Gift for {person} | {product} for {person}
- The {product} I bought for {money} is broken already. | Paid {money} for that {product} and it's dead.
  That {product} cost me {money} and it doesn't even work. | {money} gone, the {product} broke on day one.
> Ask for a refund, {money} is a lot. | Do you still have the receipt for the {product}?
> My {product} broke too!
= Broken {product} | Want my {money} back for the {product}
- Can you pick up {grocery} and {grocery2} on the way home?
  We're out of {grocery} and {grocery2}, can you stop by the store?
  Please grab {grocery} and {grocery2} before you come home.
  Shopping list: {grocery}, {grocery2}. Can you get it?
> Got the {grocery}, they had no {grocery2}. | Sure, how much {grocery}? And {grocery2}?
> I'm home already, will get {grocery} and {grocery2} later.
= Groceries: {grocery}, {grocery2} | Need {grocery} and {grocery2}
- Selling my {product}, {money}, pick up in {city}. | My {product} is for sale in {city}, asking {money}.
  Anyone in {city} want a used {product} for {money}?
  {money} and the {product} is yours, you collect in {city}.
> Is the {product} still available? I'm in {city}. | Would you take less than {money}?
> Can you post it from {city}?
= For sale: {product} | {product}, {money}, {city}
@ food
- Could we book {venue} for {count} people {date} at {time}?
  A table for {count} at {venue} {date} at {time}, please.
  We'd like a table at {venue} {date}, {time}, {count} of us.
  Do you have room for {count} at {venue} {date}, {time}?
> Your table at {venue} is booked for {time}. | Sorry, {venue} is full at {time}.
> We have you down for {count} at {time}, see you {date}.
= Table at {venue} {date} | Booking for {count} at {venue}
- Let's order {dish} from {venue}, it's {price} each. | How about {dish} from {venue}? {price} a head.
  I feel like {dish}. {venue} has it for {price}. | {venue} does {dish} for {price}, want some?
> Yes please, {dish} for me too. | I'm sick of {dish}, anything else at {venue}? | {price} is fine, get two.
= {dish} from {venue} | {dish} for {price}
- Can you send me {person}'s recipe for {dish}? | I want to make {person}'s {dish}, do you know how?
  Who has the {dish} recipe that {person} used? | Looking for the {dish} {person} made, is it written down?
> It's on the fridge, {person}'s {dish} needs two hours. | Ask {person}, I never wrote the {dish} down.
> Found {person}'s recipe, sending you a photo.
= {person}'s {dish} | Recipe for {dish} ({person})
- I'll bring {dish} to {person}'s party {date}. | For {person}'s party {date} I'm making {dish}.
  Put me down for {dish}, I'm coming to {person}'s {date}. | {date} at {person}'s, the {dish} is on me.
> Great, I'll bring drinks to {person}'s. | {person} is vegan, is the {dish} ok?
> Love your {dish}, see you {date}!
= {dish} for {person}'s party | Party at {person}'s {date}
@ media
- Have you seen {media}? {person} says it's great. | {person} keeps telling me to watch {media}, worth it?
  Is {media} any good? {person} loved it. | {person} gave {media} ten out of ten, should I watch it?
> I saw {media}, the ending is weird. | {person} likes everything, skip {media}.
> Let's watch {media} with {person}!
= Watch {media}? | {person} recommends {media}
- Play {media} in the {room} at {time}. | Put {media} on the {room} speaker at {time}.
  At {time} I want to hear {media} in the {room}. | Start {media} at {time} on the speaker in the {room}.
> Ok, {media} in the {room} at {time}. | I can't find {media}, try another title.
> The {room} speaker is offline, so no {media}.
= {media} in the {room} | Playing {media} at {time}
- Got us tickets to {media}, {date} at {place}. {money} a seat.
  {media} is on at {place} {date}, I paid {money} each.
  I spent {money} on seats for {media}, it's {date} at {place}.
  We have seats for {media} at {place} {date}, {money} a person.
> Wow, {money} for {media}? | See you at {place} {date}! | Save me a seat at {place}, I love {media}.
= Tickets for {media} | {media} at {place}
- Book club reads {media} next, we meet {date} at {person}'s.
  {person} hosts book club {date}, please finish {media}.
  Next up is {media}, book club is {date} with {person}.
  Read {media} before {date}, we're meeting at {person}'s.
> I'm only halfway through {media}. | I'll be at {person}'s {date}. | Can {person} make it {date2} instead?
= Book club: {media} | Book club at {person}'s {date}
@ banking notice
- You paid {money} at {shop} with card ending {digits}. | Card {digits} was charged {money} by {shop}.
  {shop} took {money} from your card ending in {digits}.
  A payment of {money} to {shop} was made with card {digits}.
> I did not pay {money} at {shop}, that's not mine. | Please block card {digits}.
> Yes, that {money} at {shop} was me.
= Card payment at {shop} | {money} spent with card {digits}
- You received {money} from {person} {past}. | {person} transferred {money} to you {past}.
  {money} from {person} landed in your account {past}. | Incoming payment {past}: {money}, sender {person}.
> Thanks {person}, got the {money}. | What did {person} send {money} for?
> I sent the {money} back to {person}.
= Payment from {person} | You received {money} from {person}
- Your loan payment of {money} to {org} is due on {day}. | {org} will collect {money} on {day} for your loan.
  On {day} we debit {money} for your loan with {org}. | Loan reminder: {money} to {org} by {day}.
> Can I pay {org} on {day2} instead? | The {money} for {org} is in the account.
> I want to close my loan with {org}.
= Loan payment due {day} | {money} to {org}
@ banking
- You owe me {money} for dinner at {venue}. | Can you send me {money} for {venue}?
  Your share at {venue} was {money}. | Dinner at {venue} came to {money} each, please transfer it.
> Just sent you {money} for {venue}. | Did that {money} include the tip? | I thought {person} paid at {venue}.
= {money} for {venue} | Dinner bill, {venue}
- The rent is {money} and it's due on {day}. | Please pay {money} for the rent by {day}.
  Remember, {day} is rent day, {money} as usual. | The landlord wants the rent, {money}, by {day}.
> Paid the {money} already. | Can I pay on {day2} instead of {day}?
> I'll set up a transfer of {money} for {day}.
= Rent due {day} | Rent of {money}
@ home
- Set the {room} to {degrees} degrees at {time}. | Make it {degrees} degrees in the {room} by {time}.
  I'd like {degrees} degrees in the {room} from {time}.
  Warm the {room} to {degrees} degrees, start at {time}.
> Ok, the {room} will be {degrees} degrees at {time}. | I can't reach the {room} thermostat, try at {time2}.
> {degrees} in the {room} is too warm for me.
= {room} at {degrees} degrees | Heating the {room} at {time}
- Turn off the {device} in the {room} at {time}. | Switch the {room} {device} off at {time}.
  At {time} I want the {device} in the {room} off. | No more {device} in the {room} after {time}, please.
> Done, the {room} {device} goes off at {time}. | There is no {device} in the {room}.
> The {room} {device} is off already.
= {room} {device} | {device} off at {time}
- The {trade} can come {date} between {time} and {time2}.
  {date} from {time} to {time2} we have the {trade} here.
  Someone has to be home {date}, the {trade} comes between {time} and {time2}.
  We got a slot with the {trade} {date}, {time} to {time2}.
> I can be home for the {trade} {date}. | {time} is too early for me. | Can the {trade} come after {time2}?
= {trade} {date} | {trade} between {time} and {time2}
- It's {person}'s turn to {chore} {date}. | {person} has to {chore} {date}.
  The chart says {person} should {chore} {date}. | {date} it's on {person} to {chore}.
> But {person} never does it! | I'll swap with {person}, I'm home {date}.
> Fine, I'll tell {person} to {chore}.
= {person}: {chore} | Chores {date} for {person}
- A parcel for {person} is with the neighbors at number {count}.
  Number {count} took in a parcel for {person}. | {person}'s parcel was left next door, at number {count}.
  The driver gave {person}'s parcel to number {count}.
> Thanks, I'll ring at number {count}. | {person} is away, can they keep it? | I'll tell {person} to fetch it.
= Parcel for {person} | {person}'s parcel, number {count}
@ work
- Please send the {topic} report to {person} by {day}. | {person} needs the {topic} report by {day}.
  Can you get {person} the {topic} report by {day}? | The {topic} report for {person} is due on {day}.
> I'll have the {topic} report done on {day}. | Does {person} want slides on {topic} too?
> {person} already has the {topic} report.
= {topic} report for {person} | {topic} report due {day}
- The {topic} call is at {url}, we start at {time}. | Join the {topic} call at {time}: {url}
  Here is the link for {topic} at {time}: {url} | {topic} call, {time}, use this link: {url}
> {url} doesn't open for me. | I'll join the {topic} call at {time}. | Can someone record {topic} at {time}?
= {topic} call at {time} | Link for {topic}, {time}
- I'm sick, can {person} cover my shift at {place} {date}?
  Feeling awful. Could {person} work for me at {place} {date}?
  Can't work {date}, is {person} free to do {place}?
  I need {person} to stand in for me at {place} {date}, I'm ill.
> Get well soon, {person} will do it. | {person} is off {date} too, I'll ask around.
> I'll do the {place} shift myself.
= Cover at {place} {date} | Sick {date}, maybe {person}?
- {org} wants to meet {date}, bring the {topic} slides.
  We see {org} {date}, so please finish the {topic} slides.
  {date} we're at {org}, are the {topic} slides done? | We need the {topic} slides ready for {org} {date}.
> The {topic} slides are nearly done. | Who is coming from {org}? | Can we move {org} to {date2}?
= {org} meeting {date} | {topic} slides for {org}
- Invoice {code} from {org} is unpaid, {money}. | {org} says we never paid invoice {code}, it's {money}.
  Still open: invoice {code}, {org}, {money}. | We owe {org} {money} on invoice {code}.
> I paid invoice {code} {past}. | Please forward {code}, I never got it.
> {money}? Our contract with {org} says less.
= Invoice {code} | {org} wants {money}
@ weather notice
- Expect {weather} in {city} {date} after {time}. | Forecast for {city}: {weather} {date} from {time}.
  {date} brings {weather} to {city}, starting around {time}.
  Warning for {city}: {weather} {date}, from {time} on.
> I'll leave {city} before {time} then. | Guess the picnic in {city} is off.
> {weather} again? I want out of {city}.
= {weather} in {city} | {city} forecast {date}
@ weather
- What's the weather like in {city} {date}? I'm seeing {person}.
  Will it be cold in {city} {date}? I'm out with {person}.
  Do I need warm clothes in {city} {date}? Meeting {person} there.
  I'm off to {city} {date} to see {person}, how is the weather?
> Dress warm, {city} is freezing. | Sunny all day in {city}, say hi to {person}!
> It's wet in {city}, take boots.
= {city} weather {date} | Seeing {person} in {city}
@ family
- School called, {person} has a fever and has to be picked up by {time}.
  {person} is unwell at school, someone needs to be there by {time}.
  Can you get {person} from school by {time}? Fever again.
  {person} feels ill, the teacher wants a pickup by {time}.
> I can be there before {time}. | Poor {person}, I'm leaving now. | Can grandma fetch {person} at {time}?
= {person} is unwell | Pick up {person} by {time}
- {person}'s {sport} practice is at {place} {date}. | {date} {person} has {sport} at {place}.
  They moved {sport} to {place} {date}, please tell {person}.
  Who takes {person} to {sport} {date}? It's at {place}.
> I can drive {person} to {place}. | {person} hates {sport}, you know that.
> See you at {place}, I'll bring snacks.
= {person}'s {sport} practice | {sport} at {place} {date}
- {person} and {person2} are getting married in {city} on {day}!
  The wedding of {person} and {person2} is on {day} in {city}.
  Save the date: {person} and {person2}, {city}, {day}.
  On {day} we celebrate {person} and {person2} in {city}.
> Congrats to {person} and {person2}! | I'll look for a train to {city}.
> Can't wait for {day}, what do I wear?
= Wedding of {person} and {person2} | Wedding in {city}, {day}
@ out and about
- I'm {count} minutes late, tell {person} to go into {place} without me.
  Start without me at {place}, {person}, I need {count} minutes.
  Still {count} minutes away from {place}, is {person} there?
  Wait at {place} with {person}, I'm {count} minutes out.
> No worries, {person} is late too. | We're already inside {place}. | {count} minutes? {person} is starving!
= Late for {place} | {count} minutes late, {person}
- I left my {product} at {place}, can you check? | Is my {product} still at {place}? I forgot it there.
  Has anyone handed in my {product} at {place}? | Could you look around {place} for my {product}?
> Found your {product} at the front desk of {place}. | Sorry, no {product} here.
> I'll go by {place} and look.
= Lost {product} | {product} left at {place}
- Easy run at {place} {date}? {time}, {count} km. | Join me for {count} km at {place} {date}, {time}.
  I'm running {count} km around {place} {date} at {time}, come along.
  {date}, {time}, {place}: {count} km, slow pace. You in?
> My knee hurts, {count} km is too much. | See you at {place}, {time} sharp. | Not {time}, how about {time2}?
= Run at {place} {date} | {count} km at {time}
@ health notice
- Your appointment with Dr {surname} is confirmed for {day} at {time}.
  You are booked in with Dr {surname} on {day}, {time}.
  Reminder: Dr {surname} will see you at {time} on {day}.
  Confirmed: Dr {surname}, {day}, {time}. Please be early.
> Thank you, I will be there at {time}. | I need to cancel my visit to Dr {surname}.
> Can Dr {surname} do {day2}?
= Appointment with Dr {surname} | Your visit on {day}, {time}
- Your prescription from Dr {surname} is ready at {shop}.
  {shop} has filled the prescription Dr {surname} wrote.
  You can collect Dr {surname}'s prescription at {shop}. | Pick up what Dr {surname} prescribed at {shop}.
> I'll come by {shop} after work. | Did Dr {surname} write two boxes or one? | Can {shop} deliver it?
= Prescription ready at {shop} | Medicine from Dr {surname}
"""

NER_APP_TEMPLATES = """
Remind me to ring {person} about the {product} {date}. | Tell {person} I'm close to {place}, there by {time}.
{person} parked outside {place}, level {count}. | Split {money} between {person} and {person2}.
Block {time} to {time2} {date} for the dentist. | Navigate to {place} and avoid tolls.
How far is {place} from {city}? | Wake me at {time} on {day}, {place} is a long drive.
Coffee near {place} with {person} and {person2} around {time}. | Is the {product} under {money} anywhere?
{person} gave back the {product} {past} and got {money}. | Bus {code} from {place} goes at {time}.
Log {price} for parking at {place} {past}. | Did {person} really pay {money} for one {product}?
My {product} died in {city}, so ring the hotel. | Add the {product} to my wish list, {money} max.
{city} or {city2} for the team trip? {person} votes {city2}.
Ask {person} whether {day} at {time} suits the movers. | The keys to {place} are with {person} until {time}.
Photo of {person} in {city}, taken {past}. | Moving to {city} {date}, so everything goes, even the {product}.
Dr {surname} wants to see me {date} at {time}. | Send {money} to {person}, note: half the {product}.
I walked from {place} to {place2} in {count} minutes. | Who signed for the {product} at {place} {past}?
{person} starts in the {city} office on {day}. | Show photos from {city} with {person} in them.
The door code for {place} is {code}, {person} set it {past}. | {money}, {person}? For one {product}? No way.
Cheapest way from {city} to {city2} on {day}, after {time}.
{person}: can you grab my {product} from {place}? | The pool at {place} is closed {day} and {day2}.
May I borrow the {product} until {day}? {person} said yes.
Budget for {month}: {money}, mostly the {product}. | {person} will mark the exams and will call at {time}.
Grace period ends {date}, then the fee is {money}. | The {product} warranty ran out in {month}.
Rose garden behind {place}, bench {count}, {time}.
Note to self: {person} hates surprises, scrap {place} on {day}.
Turn left after {place}, then it's {count} blocks. | Landing in {city} at {time}, {person} has the {product}.
Change the {city} fare alert to {money}. | Voice memo from {person}, {past} at {time}.
I saw {person} buy the {product} near {place} for {money}.
Doors open at {time}, {place}, wear something red. | From {month} on, {person} looks after {city}.
Tip {person} {price}, the {product} came gift wrapped. | Lend {person} my {product}? Only after {day}.
Need a locker in {city} from {time}, {price} a bag. | New alarm: {time}, label it {person}'s flight to {city}.
{person} left {place} at {time} and isn't home. | {day} is bad, {person} has the car and I have no {product}.
Search my mail for the {product} receipt, about {money}, from {month}.
What did {person} say about {city} {past}? | The fence outside {place} needs paint, quote is {money}.
First {place} at {time}, then {place2} with {person}, then sleep. | {city} was cold, {city2} was colder.
Take {person}'s {product} along and collect {price}. | Does {place} open before {time} on {day}?
Seat {code} on the {time} to {city}, take the {product}.
{person} is in {city} from {day} and in {city2} from {day2}. | Zoom in on {place}, no, the one in {city}.
Found {price} in the pocket of my {product}. | {person} or {person2}, who of them knows {city}?
"""

# The intents share words on purpose (an order can be stopped, chased or sent back; a reminder can be about a
# call, a text or a return), so that single words do not give the label away.
TC_APP_TEMPLATES: dict[str, str] = {
    "cancel_order": """
I don't want the {product} anymore, stop the order. | Stop my {product} order before it ships.
Please call off the {product} I bought {past}. | Changed my mind about the {product}, don't send it.
Drop order {code}, I found a cheaper {product}. | Is it too late to undo my {product} purchase?
I ordered the {product} twice, take one off. | Can the {product} still come out of order {code}?
I need order {code} gone, it hasn't left yet, has it? | {money} for the {product} was a mistake, void it.
Order {code} should not go through. | Since it hasn't shipped, forget about the {product}.
The {product} isn't here yet and I no longer want it. | Withdraw the {product} order from {past}.
""",
    "track_order": """
Where is my {product} right now? | Has the {product} shipped yet? | When will order {code} get here?
Any news on the {product} I bought {past}? | Is the {product} still coming {date}?
Order {code} was due {past}, what's going on? | My {product} hasn't left yet, has it?
How many stops away is the driver with my {product}? | Show me the status of order {code}.
I paid {money} and the {product} isn't here. | Did order {code} go out {past} or not?
Which day does the {product} get to {city}? | Is somebody bringing the {product} before {time}?
Order {code} still says pending, why?
""",
    "return_item": """
The {product} arrived broken, I want to send it back. | How do I get my {money} back for the {product}?
This {product} is the wrong size, swap it please. | Where do I drop off the {product} I don't want anymore?
Print a label so I can ship the {product} back. | I'd like a refund on order {code}, it came damaged.
The {product} got here {past} but it's not what I ordered.
Arrange a pickup for the {product}, I'm not keeping it.
Can I take the {product} to {place} and get my money?
Is it too late to give back the {product} from {month}? | Got two of the {product}, one has to go back.
Order {code} came, opened it, hate it, money back please. | The {product} stopped working, start an exchange.
Undo order {code}, the box is already here.
""",
    "create_event": """
Put lunch with {person} on my calendar for {day}. | Schedule a call with {person} {date} at {time}.
Block off {time} {date} for {person}. | I'm seeing {person} at {place} on {day}, save that.
New appointment: {place}, {day}, {time}. | Add the visit to {city} to my agenda for {day}.
Pencil in {person} for {time} {date}. | Book an hour with {person} around {time}.
Dinner at {place} {date}, please note it down. | Set up a meeting at {time}, invite {person} and {person2}.
Make room {date} for drinks with {person}. | There's a party at {person}'s on {day}, put it in.
My dentist is {day} at {time}, keep that slot for it. | Plan a walk with {person} {date}.
""",
    "move_event": """
Push my meeting with {person} to {time}. | Can we shift {person} from {day} to {day2}?
Make the {time} call with {person} a bit later. | I can't do {day}, put {person} in the next free slot.
Lunch at {place} has to be {day} instead. | Change the start of my {time} appointment to {time2}.
Bring the talk with {person} forward to {time}. | Swap my {day} and {day2} meetings.
Put {person} on {day} rather than {day2}. | Delay everything after {time} by {count} minutes.
The {place} booking should be at {time}, not {time2}. | Find another hour for {person}, {day} is full.
Reschedule what I have at {time} {date}. | Drinks with {person} are now {date}, fix my calendar.
""",
    "set_reminder": """
Remind me to call {person} {date}. | Don't let me forget the {product} {date}.
Nudge me at {time} about {person}'s present. | I must pay {person} {money} by {day}, remind me.
At {time} tell me to leave for {place}. | Ping me {date} to order the {product}.
Make sure I text {person} before {time}. | Give me a heads up {count} minutes before {place}.
I always forget to water the plants, prod me at {time}.
On {day} I need a nudge to cancel the {product} order. | Alert me on {day} to send back the {product}.
When I'm near {place}, remind me about the {product}. | Keep bugging me until I write to {person}.
Set a reminder for {day}: renew the {city} permit.
""",
    "send_message": """
Text {person} that I'm running late. | Let {person} know I'm at {place}. | Write to {person}: see you {date}.
Tell {person} to bring the {product}. | Message {person} and {person2} that {time} is fine.
Ask {person} if {day} works. | Reply to {person} that the {product} arrived.
Say happy birthday to {person} for me. | Drop {person} a line about {city}. | Answer {person}: yes, {time}.
Can you let {person} know the meeting moved to {time}? | Shoot {person} a note saying I'll call {date}.
Forward the {place} address to {person}. | Warn {person} that order {code} was cancelled.
""",
    "call_contact": """
Call {person} on speaker. | Ring {person} at work. | Get {person} on the phone. | Dial {phone} for me.
Phone {place} and put me through. | I need to talk to {person} right now.
Try {person} again, it went to voicemail. | Call back whoever rang at {time}.
Start a video call with {person} and {person2}. | Put me on with {person} in {city}.
Give {person} a ring about the {product}. | Connect me to the front desk at {place}.
Can you reach {person} by phone before {time}? | Return {person}'s call from {past}.
""",
}
