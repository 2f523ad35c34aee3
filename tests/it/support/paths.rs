//! One history of events, sent down every path into the relay and read back on every path out of it.

use serde_json::json;
use sledge::protocol::Event;

use super::binary::{Binary, lines};
use super::stores::in_order;
use super::{Keys, Relay, ids};

/// Events in the order they are published, and what each must be answered.
#[derive(Default)]
pub struct History<'e> {
    steps: Vec<Step<'e>>,
}

struct Step<'e> {
    event: &'e Event,
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

impl<'e> History<'e> {
    pub fn new() -> Self {
        History::default()
    }

    fn step(mut self, event: &'e Event, answer: Answer) -> Self {
        self.steps.push(Step { event, answer });
        self
    }

    pub fn stored(self, event: &'e Event) -> Self {
        self.step(event, Answer::Stored)
    }

    pub fn duplicate(self, event: &'e Event) -> Self {
        self.step(event, Answer::Duplicate)
    }

    pub fn refused(self, event: &'e Event, prefix: &'static str) -> Self {
        self.step(event, Answer::Refused(prefix))
    }

    /// Checks that exactly `kept` remains: answered to REQ and COUNT, after publishing, after a restart, after
    /// publishing everything again, after import, a second import and compaction, and that live subscribers got what
    /// was stored and nothing else.
    pub async fn leaves(self, kept: &[&Event]) {
        let relay = self.publish(kept).await;
        let relay = relay.restart().await;
        self.reads(&relay, kept, "after a restart").await;
        self.publish_again(&relay).await;
        self.reads(&relay, kept, "after everything was published again").await;
        let stopped = relay.stop().await;
        let binary = Binary::on(stopped.dir());
        self.exports(&binary, kept, "of the relay's directory");
        binary.run(&["compact"]).ok();
        self.exports(&binary, kept, "after compaction");
        binary.import(self.steps.iter().map(|step| step.event));
        self.exports(&binary, kept, "after compaction and import");
        let relay = stopped.start().await;
        self.publish_again(&relay).await;
        self.reads(&relay, kept, "after compaction and publishing again").await;
        self.imports(kept);
    }

    async fn publish(&self, kept: &[&Event]) -> Relay {
        let relay = Relay::start().await;
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
        self.reads(&relay, kept, "as published").await;
        let last = Keys::new(u64::MAX).draft(20_001, super::NOW).sign();
        publisher.publish(&last).await;
        let broadcast = self.steps.iter().filter(|step| step.answer == Answer::Stored).map(|step| step.event);
        assert_eq!(reader.live_before("live", &last.id.to_hex()).await, ids(broadcast), "live");
        relay
    }

    /// Publishes all once more. Answers may differ now (what was stored may be deleted); what remains may not.
    async fn publish_again(&self, relay: &Relay) {
        let mut client = relay.client().await;
        for step in &self.steps {
            client.publish(step.event).await;
        }
    }

    async fn reads(&self, relay: &Relay, kept: &[&Event], when: &str) {
        let mut client = relay.client().await;
        let expected = in_order(kept.iter().copied());
        assert_eq!(client.query_ids(json!({})).await, expected, "REQ {{}} {when}");
        let all = json!({"ids": ids(self.steps.iter().map(|step| step.event))});
        assert_eq!(client.query_ids(all.clone()).await, expected, "REQ by ids {when}");
        assert_eq!(client.count(&[all, json!({})]).await, kept.len() as u64, "COUNT {when}");
    }

    fn exports(&self, binary: &Binary, kept: &[&Event], when: &str) {
        let mut expected = ids(kept.iter().copied());
        expected.sort();
        assert_eq!(binary.exported_ids(), expected, "export {when}");
    }

    fn imports(&self, kept: &[&Event]) {
        let binary = Binary::new();
        let input = lines(self.steps.iter().map(|step| step.event));
        for when in ["after import", "after a second import"] {
            binary.run_with(&["import", "-"], input.as_bytes()).ok();
            self.exports(&binary, kept, when);
        }
        binary.run(&["compact"]).ok();
        binary.run_with(&["import", "-"], input.as_bytes()).ok();
        self.exports(&binary, kept, "after import, compaction and import");
    }
}
