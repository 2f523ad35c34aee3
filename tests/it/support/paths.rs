//! One history of events, sent down every path into the relay and read back on every path out of it.

use serde_json::json;
use sledge::protocol::Event;

use super::binary::Binary;
use super::stores::in_order;
use super::{Keys, Relay, ids};

/// Events in the order they are published, what each must be answered, and what remains.
#[derive(Default)]
pub struct History {
    steps: Vec<Step>,
    kept: Vec<Event>,
}

struct Step {
    event: Event,
    answer: Answer,
}

#[derive(Clone, Copy, PartialEq)]
enum Answer {
    /// `OK true ""`, and broadcast.
    Stored,
    /// `OK true "duplicate: …"`, not broadcast.
    Duplicate,
    /// `OK false` with this beginning, not broadcast.
    Refused(&'static str),
}

impl History {
    pub fn new() -> Self {
        History::default()
    }

    fn step(mut self, event: &Event, answer: Answer) -> Self {
        self.steps.push(Step { event: event.clone(), answer });
        self
    }

    pub fn stored(self, event: &Event) -> Self {
        self.step(event, Answer::Stored)
    }

    pub fn duplicate(self, event: &Event) -> Self {
        self.step(event, Answer::Duplicate)
    }

    pub fn refused(self, event: &Event, prefix: &'static str) -> Self {
        self.step(event, Answer::Refused(prefix))
    }

    /// What remains of it.
    pub fn keeps<'e>(mut self, kept: impl IntoIterator<Item = &'e Event>) -> Self {
        self.kept.extend(kept.into_iter().cloned());
        self
    }

    /// A history of other keys, which goes on in the same relay.
    pub fn then(mut self, next: History) -> Self {
        self.steps.extend(next.steps);
        self.kept.extend(next.kept);
        self
    }

    /// Checks that exactly what was to be kept remains: answered to REQ and COUNT, after publishing, after a restart,
    /// after publishing everything again, after import, a second import and compaction, and that live subscribers got
    /// what was stored and nothing else.
    pub async fn holds_on_every_path(self) {
        let relay = self.publish().await;
        let relay = relay.restart().await;
        self.reads(&relay, "after a restart").await;
        self.publish_again(&relay).await;
        self.reads(&relay, "after everything was published again").await;
        let stopped = relay.stop().await;
        let binary = Binary::on(stopped.dir());
        self.exports(&binary, "of the relay's directory");
        binary.run(&["compact"]).ok();
        binary.import(self.events());
        self.exports(&binary, "after compaction and import");
        let relay = stopped.start().await;
        self.publish_again(&relay).await;
        self.reads(&relay, "after compaction and publishing again").await;
        self.imports();
    }

    fn events(&self) -> impl Iterator<Item = &Event> {
        self.steps.iter().map(|step| &step.event)
    }

    async fn publish(&self) -> Relay {
        // What remains is the question here; who may read it is another.
        let relay = Relay::with(|config| config.access.private_kinds.clear()).await;
        let mut reader = relay.client().await;
        reader.req("live", &[json!({"limit": 0})]).await;
        let mut publisher = relay.client().await;
        for (at, Step { event, answer }) in self.steps.iter().enumerate() {
            let (accepted, text) = publisher.publish(event).await;
            let as_expected = match answer {
                Answer::Stored => accepted && text.is_empty(),
                Answer::Duplicate => accepted && text.starts_with("duplicate: "),
                Answer::Refused(prefix) => !accepted && text.starts_with(prefix),
            };
            assert!(as_expected, "step {at}: {event:?}\nwas answered {accepted} {text:?}");
        }
        self.reads(&relay, "as published").await;
        let last = Keys::new(u64::MAX).draft(20_001, super::NOW).sign();
        publisher.publish(&last).await;
        let broadcast = self.steps.iter().filter(|step| step.answer == Answer::Stored).map(|step| &step.event);
        assert_eq!(reader.live_before("live", &last.id.to_hex()).await, ids(broadcast), "live");
        relay
    }

    /// Publishes all once more. Answers may differ now (what was stored may be deleted); what remains may not.
    async fn publish_again(&self, relay: &Relay) {
        let mut client = relay.client().await;
        for step in &self.steps {
            client.publish(&step.event).await;
        }
    }

    async fn reads(&self, relay: &Relay, when: &str) {
        let mut client = relay.client().await;
        let expected = in_order(&self.kept);
        assert_eq!(client.query_ids(json!({})).await, expected, "REQ {{}} {when}");
        let all = json!({"ids": ids(self.events())});
        assert_eq!(client.query_ids(all.clone()).await, expected, "REQ by ids {when}");
        assert_eq!(client.count(&[all, json!({})]).await, self.kept.len() as u64, "COUNT {when}");
    }

    fn exports(&self, binary: &Binary, when: &str) {
        let mut expected = ids(&self.kept);
        expected.sort();
        assert_eq!(binary.exported_ids(), expected, "export {when}");
    }

    fn imports(&self) {
        let binary = Binary::new();
        binary.import(self.events());
        self.exports(&binary, "after import");
        binary.import(self.events());
        self.exports(&binary, "after a second import");
    }
}
