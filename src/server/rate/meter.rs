//! The limits on one connection: what it says is charged to the account of its address before it is acted upon.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Account, Clients, Excess};
use crate::config::Live;
use crate::protocol::PublicKey;
use crate::protocol::message::{ClientMessage, Refusal};
use crate::relay::ingest::Rejection;

/// A message that cannot be read.
const UNREADABLE_POINTS: u64 = 1;
/// An event whose id or signature does not hold; a signature costs 25 µs to check.
const FORGED_POINTS: u64 = 5;
/// Frames that are no WebSocket, or larger than a message may be: the connection is lost already.
const BROKEN_POINTS: u64 = 20;

/// For how long a connection that was refused something is not read, so that asking on costs the relay little.
pub const PAUSE: Duration = Duration::from_millis(50);

/// How to go on with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    /// As before.
    Fine,
    /// Do not read for [`PAUSE`].
    Pause,
    /// The address is shut out: close.
    Banned,
}

/// Charges one connection's messages to its address.
#[derive(Debug)]
pub struct Meter {
    /// None where no limits apply.
    account: Option<Arc<Account>>,
    clients: Arc<Clients>,
    config: Live,
}

impl Meter {
    /// For a connection whose address has this account; none is exempt from everything.
    pub fn new(clients: Arc<Clients>, account: Option<Arc<Account>>, config: Live) -> Self {
        Meter { account, clients, config }
    }

    /// The client has proven these keys (NIP-42): if one is exempt, nothing is charged from now on.
    pub fn prove(&mut self, keys: &[PublicKey]) {
        let rate = &self.config.load().rate;
        if keys.iter().any(|key| rate.exempt_keys.contains(&key.to_hex())) {
            self.account = None;
        }
    }

    /// Charges a message of `bytes` bytes, and `queried`, the time that query threads have spent on the connection
    /// since the last one. What is too much becomes the refusal that its sender waits for.
    pub fn charge(
        &self,
        parsed: Result<ClientMessage, Refusal>,
        bytes: usize,
        queried: Duration,
        now: Instant,
    ) -> (Result<ClientMessage, Refusal>, Conduct) {
        let Some(account) = &self.account else {
            return (parsed, Conduct::Fine);
        };
        let (rate, now) = (&self.config.load().rate, self.clients.nanos(now));
        let mut spent = account.lock();
        if spent.banned_until > now {
            return (parsed, Conduct::Banned);
        }
        spent.owe_query_time(queried, rate, now);
        let charged = spent.spend_bytes(bytes, rate, now).and_then(|()| match &parsed {
            Ok(ClientMessage::Event(_) | ClientMessage::Auth(_)) => spent.spend_event(rate, now),
            Ok(ClientMessage::Close(_) | ClientMessage::NegClose(_)) => Ok(()),
            Ok(_) => spent.spend_request(rate, now),
            // What is refused unread is a question like any other.
            Err(_) => spent.spend_request(rate, now),
        });
        let unreadable = parsed.as_ref().err().is_some_and(is_garbage);
        drop(spent);
        if unreadable && account.owe_garbage(UNREADABLE_POINTS, rate, now) {
            return (parsed, Conduct::Banned);
        }
        match (charged, parsed) {
            (Err(excess), Ok(message)) => refuse(message, excess),
            (Err(_), refused) => (refused, Conduct::Pause),
            (Ok(()), parsed) => (parsed, Conduct::Fine),
        }
    }

    /// Charges a frame that is no message: a ping, which has to be answered, costs about as much as a small question.
    pub fn control(&self, now: Instant) -> Conduct {
        let now = self.clients.nanos(now);
        match &self.account {
            Some(account) if account.lock().spend_request(&self.config.load().rate, now).is_err() => Conduct::Pause,
            _ => Conduct::Fine,
        }
    }

    /// Charges an event that ingest has refused.
    pub fn rejected(&self, rejection: &Rejection, now: Instant) -> Conduct {
        match rejection {
            Rejection::Invalid(_) => self.charge_points(FORGED_POINTS, now),
            _ => Conduct::Fine,
        }
    }

    /// Charges a connection that must be closed for what it sent.
    pub fn broken(&self, now: Instant) {
        self.charge_points(BROKEN_POINTS, now);
    }

    fn charge_points(&self, points: u64, now: Instant) -> Conduct {
        let now = self.clients.nanos(now);
        match &self.account {
            Some(account) if account.owe_garbage(points, &self.config.load().rate, now) => Conduct::Banned,
            _ => Conduct::Fine,
        }
    }
}

/// Whether a refused message is nothing that a client would say; what is merely not supported is.
fn is_garbage(refusal: &Refusal) -> bool {
    match refusal {
        Refusal::Ok { text, .. }
        | Refusal::Closed { text, .. }
        | Refusal::NegErr { text, .. }
        | Refusal::Notice(text) => !text.starts_with("unsupported:"),
    }
}

/// What a message becomes that was too much. Ending a subscription is never too much.
fn refuse(message: ClientMessage, excess: Excess) -> (Result<ClientMessage, Refusal>, Conduct) {
    let text = excess.to_string();
    let refusal = match message {
        ClientMessage::Event(event) | ClientMessage::Auth(event) => Refusal::Ok { id: event.id.to_hex(), text },
        ClientMessage::Req(id, _) | ClientMessage::Count(id, _) => Refusal::Closed { id: id.as_str().to_owned(), text },
        ClientMessage::NegOpen(id, ..) | ClientMessage::NegMsg(id, _) => {
            Refusal::NegErr { id: id.as_str().to_owned(), text }
        }
        ClientMessage::Close(_) | ClientMessage::NegClose(_) => return (Ok(message), Conduct::Pause),
    };
    (Err(refusal), Conduct::Pause)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;
    use crate::protocol::message::publish;
    use crate::protocol::testing::{Author, NOW};

    struct Bench {
        meter: Meter,
        start: Instant,
    }

    fn bench(change: impl FnOnce(&mut Config)) -> Bench {
        let mut config = Config::default();
        change(&mut config);
        let start = Instant::now();
        let clients = Arc::new(Clients::new(start));
        let account = clients.account("192.0.2.1".parse().unwrap(), start);
        Bench { meter: Meter::new(clients, Some(account), Arc::new(config).into()), start }
    }

    impl Bench {
        /// The text of a refusal, empty when there is none, and the conduct.
        fn say(&self, text: &str, millis: u64) -> (String, Conduct) {
            let now = self.start + Duration::from_millis(millis);
            let (parsed, conduct) = self.meter.charge(ClientMessage::parse(text), text.len(), Duration::ZERO, now);
            (parsed.err().map_or_else(String::new, |refusal| refusal.to_json()), conduct)
        }
    }

    fn event() -> String {
        let note = Author::new(1).note(NOW, "");
        publish(std::str::from_utf8(&note.canonical().json).unwrap())
    }

    /// Each kind of message has its own limit and the answer that its sender waits for.
    #[test]
    fn too_much_is_answered_in_kind() {
        let bench = bench(|config| {
            (config.rate.events_per_sec, config.rate.events_burst) = (1, 1);
            (config.rate.reqs_per_sec, config.rate.reqs_burst) = (1, 2);
        });
        let fine = (String::new(), Conduct::Fine);
        assert_eq!(bench.say(&event(), 0), fine);
        let (text, conduct) = bench.say(&event(), 0);
        assert!(text.starts_with("[\"OK\",\"") && text.contains("false,\"rate-limited: at most 1 events"), "{text}");
        assert_eq!(conduct, Conduct::Pause);
        assert_eq!(bench.say("[\"REQ\",\"a\",{}]", 0), fine);
        assert_eq!(bench.say("[\"COUNT\",\"a\",{}]", 0), fine);
        let (text, _) = bench.say("[\"REQ\",\"b\",{}]", 0);
        assert!(text.starts_with("[\"CLOSED\",\"b\",\"rate-limited: "), "{text}");
        assert_eq!(bench.say("[\"CLOSE\",\"a\"]", 0), fine, "ending one is always possible");
        assert_eq!(bench.say("[\"REQ\",\"b\",{}]", 1_000), fine);
    }

    /// Bytes count for every message; ending a subscription is acted upon even then.
    #[test]
    fn bytes_are_limited() {
        let bench = bench(|config| (config.rate.bytes_per_sec, config.rate.bytes_burst) = (10, 10));
        assert_eq!(bench.say("[\"CLOSE\",\"a\"]", 0).1, Conduct::Fine);
        assert_eq!(bench.say("[\"CLOSE\",\"a\"]", 0), (String::new(), Conduct::Pause));
        assert!(bench.say("[\"REQ\",\"a\",{}]", 0).0.contains("rate-limited: at most 10 bytes"));
    }

    /// Garbage is counted until the address is shut out, whatever it then says; filters that are merely not supported
    /// are no garbage, and an exempt connection is charged nothing.
    #[test]
    fn garbage_is_counted() {
        let mut bench = bench(|config| {
            (config.rate.garbage_per_sec, config.rate.garbage_burst) = (1, 5);
            config.rate.exempt_keys = vec!["ab".repeat(32)];
        });
        assert!((0..9).all(|_| bench.say("[\"REQ\",\"a\",{\"search\":\"x\"}]", 0).1 == Conduct::Fine));
        let now = bench.start;
        let forged = Rejection::Invalid(crate::protocol::verify::Invalid::Signature);
        assert_eq!(bench.meter.rejected(&Rejection::Expired, now), Conduct::Fine);
        assert_eq!(bench.meter.rejected(&forged, now), Conduct::Fine);
        assert_eq!(bench.say("hello", 0).1, Conduct::Banned);
        assert_eq!(bench.say("[\"REQ\",\"a\",{}]", 0).1, Conduct::Banned);
        bench.meter.prove(&[PublicKey([7; 32])]);
        assert_eq!(bench.say("hello", 0).1, Conduct::Banned, "another key changes nothing");
        bench.meter.prove(&[PublicKey([7; 32]), PublicKey([0xab; 32])]);
        assert!((0..9).all(|_| bench.say("hello", 0).1 == Conduct::Fine));
    }
}
