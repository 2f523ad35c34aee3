//! Live delivery: complete, without repeats, in order, and to nobody else.

use std::collections::BTreeMap;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};
use sledge::protocol::{Event, Filter};
use tokio::task::JoinSet;

use crate::support::{Client, Keys, NOW, Relay, json_of};

/// Publishes all as fast as the relay takes it, a window of answers outstanding.
async fn publish_at_full_speed(mut client: Client, events: Vec<Event>) {
    const WINDOW: usize = 64;
    for (at, event) in events.iter().enumerate() {
        client.send(format!("[\"EVENT\",{}]", json_of(event))).await;
        if at >= WINDOW {
            assert!(client.ok_for(&events[at - WINDOW].id.to_hex()).await.0);
        }
    }
    for event in &events[events.len().saturating_sub(WINDOW)..] {
        assert!(client.ok_for(&event.id.to_hex()).await.0);
    }
}

/// Subscribes again and again while the author publishes, until a round has brought everything. What each round
/// brought: what was stored, and then some live events, so that rounds end at different moments.
async fn resubscribe(mut client: Client, author: String, total: usize) -> Vec<Vec<String>> {
    let mut rounds: Vec<Vec<String>> = Vec::new();
    while rounds.last().is_none_or(|round| round.len() < total) {
        let id = format!("round {}", rounds.len());
        client.subscribe(&id, &[json!({"authors": [author], "limit": 5_000})]).await;
        let mut seen = client.until_eose(&id).await.ids();
        let wanted = (seen.len() + 5 + 11 * rounds.len()).min(total);
        while seen.len() < wanted {
            seen.push(client.live(&id).await["id"].as_str().unwrap().to_owned());
        }
        client.close(&id).await;
        client.forget(&id);
        rounds.push(seen);
    }
    rounds
}

/// Listens from before the first event: the order of storing.
async fn observe(mut client: Client, total: usize) -> Vec<String> {
    let mut order = Vec::new();
    while order.len() < total {
        order.push(client.live("observer").await["id"].as_str().unwrap().to_owned());
    }
    order
}

/// No gap and no repeat between stored and live events, with publishers at full speed and readers that subscribe
/// anew all the time: each round is a beginning of the order of storing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t26_no_gap_and_no_repeat_under_load() {
    no_gap_and_no_repeat(&[&Relay::start().await], 600).await;
}

/// The same for relays on one store, with publishers, observers and readers spread over them, and so many events of each
/// of three authors.
pub async fn no_gap_and_no_repeat(relays: &[&Relay], count: usize) {
    let relay = |number: u64| relays[number as usize % relays.len()];
    let (mut publishers, mut groups) = (JoinSet::new(), Vec::new());
    for author in 0..3 {
        let keys = Keys::new(author);
        let events: Vec<Event> = (0..count).map(|n| keys.note(NOW - n as u64 % 7, &n.to_string())).collect();
        let mut observer = relay(author + 1).client().await;
        observer.req("observer", &[json!({"authors": [keys.hex()]})]).await;
        let observer = tokio::spawn(observe(observer, count));
        let mut readers = JoinSet::new();
        for number in 0..2 {
            readers.spawn(resubscribe(relay(number).client().await, keys.hex(), count));
        }
        publishers.spawn(publish_at_full_speed(relay(author).client().await, events));
        groups.push((observer, readers));
    }
    for (observer, readers) in groups {
        let order = observer.await.unwrap();
        for rounds in readers.join_all().await {
            for round in rounds {
                let mut seen = round.clone();
                let mut expected = order[..seen.len()].to_vec();
                seen.sort();
                expected.sort();
                assert_eq!(seen, expected, "a gap or a repeat among {} events", round.len());
            }
        }
    }
    publishers.join_all().await;
}

/// Random filters and events: what arrives on each subscription is what `Filter::matches` says, in order of storing.
#[tokio::test]
async fn deliveries_are_what_the_filters_mean() {
    let relay = Relay::start().await;
    let mut runner = seeded(26);
    let mut publisher = relay.client().await;
    for round in 0..12 {
        let mut reader = relay.client().await;
        let filters: Vec<Vec<Value>> =
            sample(&mut runner, proptest::collection::vec(proptest::collection::vec(filter(), 1..4), 20));
        for (at, filters) in filters.iter().enumerate() {
            reader.req(&at.to_string(), filters).await;
        }
        reader.req("all", &[json!({"limit": 0})]).await;
        let events: Vec<Event> = sample(&mut runner, proptest::collection::vec(event(round), 40));
        let mut published: Vec<&Event> = Vec::new();
        for event in &events {
            let (accepted, text) = publisher.publish(event).await;
            assert!(accepted, "{text}");
            if text.is_empty() {
                published.push(event);
            }
        }
        let mut delivered: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let last = Keys::new(1_000 + round).draft(20_500, NOW).sign();
        publisher.store(&last).await;
        let mut open = filters.iter().filter(|filters| any_matches(filters, &last)).count() + 1;
        while open > 0 {
            let message = reader.next().await;
            assert_eq!(message[0], "EVENT", "{message}");
            let (subscription, id) = (message[1].as_str().unwrap(), message[2]["id"].as_str().unwrap());
            if id == last.id.to_hex() {
                open -= 1;
            } else {
                delivered.entry(subscription.to_owned()).or_default().push(id.to_owned());
            }
        }
        assert_eq!(reader.drain().await, Vec::<Value>::new());
        for (at, filters) in filters.iter().enumerate() {
            let expected: Vec<String> =
                published.iter().filter(|event| any_matches(filters, event)).map(|event| event.id.to_hex()).collect();
            let got = delivered.remove(&at.to_string()).unwrap_or_default();
            assert_eq!(got, expected, "round {round}: {filters:?}");
        }
    }
}

fn any_matches(filters: &[Value], event: &Event) -> bool {
    filters.iter().any(|filter| Filter::from_value(filter.clone()).unwrap().matches(event))
}

/// A source of chance that is the same in every run.
pub fn seeded(seed: u8) -> TestRunner {
    TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]))
}

pub fn sample<T>(runner: &mut TestRunner, strategy: impl Strategy<Value = T>) -> T {
    strategy.new_tree(runner).expect("these strategies reject nothing").current()
}

/// Filters over so few authors, kinds and tags that about every fifth event matches.
fn filter() -> impl Strategy<Value = Value> {
    use proptest::option::weighted;
    use proptest::sample::{select, subsequence};
    let authors = weighted(0.4, subsequence((0..4).map(|n| Keys::new(n).hex()).collect::<Vec<_>>(), 0..3));
    let kinds = weighted(0.5, subsequence(vec![0, 1, 7, 20_000, 30_000], 0..4));
    let tags = weighted(0.3, (select(vec!["#t", "#d", "#T"]), subsequence(vec!["", "a", "b", "ü"], 0..3)));
    let since = weighted(0.2, NOW - 3..NOW + 1);
    let until = weighted(0.2, NOW - 3..NOW + 1);
    (authors, kinds, tags, since, until).prop_map(|(authors, kinds, tags, since, until)| {
        let mut filter = serde_json::Map::new();
        authors.map(|authors| filter.insert("authors".into(), json!(authors)));
        kinds.map(|kinds| filter.insert("kinds".into(), json!(kinds)));
        tags.map(|(name, values)| filter.insert(name.into(), json!(values)));
        since.map(|since| filter.insert("since".into(), json!(since)));
        until.map(|until| filter.insert("until".into(), json!(until)));
        filter.insert("limit".into(), json!(0));
        Value::Object(filter)
    })
}

/// Events to match; the content makes those of different rounds different.
fn event(round: u64) -> impl Strategy<Value = Event> {
    use proptest::collection::vec;
    use proptest::sample::select;
    let tag = (select(vec!["t", "d", "T", "tt"]), select(vec!["", "a", "b", "ü", "c"]));
    let shape = (0..4u64, select(vec![0u16, 1, 1, 7, 20_000, 30_000]), NOW - 3..NOW + 1, vec(tag, 0..3), 0..1_000u32);
    shape.prop_map(move |(author, kind, at, tags, salt)| {
        let keys = Keys::new(author);
        let draft = keys.draft(kind, at).content(format!("{round} {salt}"));
        tags.into_iter().fold(draft, |draft, (name, value)| draft.tag([name, value])).sign()
    })
}
