//! How long a silent client is waited for.

use std::time::Duration;

use tokio::time::Instant;

/// What the silence calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Nothing yet.
    Wait,
    /// Ask whether somebody is there.
    Ping,
    /// Nobody is there.
    End,
}

/// When a client was last heard of.
#[derive(Debug)]
pub struct Idle {
    ping_after: Duration,
    end_after: Duration,
    seen: Instant,
    pinged: bool,
}

impl Idle {
    /// A client that was heard of at `now`.
    pub fn new(ping_after: Duration, end_after: Duration, now: Instant) -> Self {
        Idle { ping_after, end_after, seen: now, pinged: false }
    }

    /// The client gave a sign of life.
    pub fn seen(&mut self, now: Instant) {
        self.seen = now;
        self.pinged = false;
    }

    /// What to do at `now`. A ping is asked for once in a silence.
    pub fn check(&mut self, now: Instant) -> Patience {
        let silent = now.saturating_duration_since(self.seen);
        if silent >= self.end_after {
            Patience::End
        } else if silent >= self.ping_after && !self.pinged {
            self.pinged = true;
            Patience::Ping
        } else {
            Patience::Wait
        }
    }

    /// When to check next.
    pub fn next(&self) -> Instant {
        self.seen + if self.pinged { self.end_after } else { self.ping_after.min(self.end_after) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One ping in a silence, then the end; any sign of life starts over.
    #[test]
    fn ping_once_then_end() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let mut idle = Idle::new(Duration::from_secs(45), Duration::from_secs(120), start);
        assert_eq!((idle.check(at(44)), idle.next()), (Patience::Wait, at(45)));
        assert_eq!((idle.check(at(45)), idle.next()), (Patience::Ping, at(120)));
        assert_eq!(idle.check(at(46)), Patience::Wait);
        idle.seen(at(50));
        assert_eq!((idle.check(at(60)), idle.next()), (Patience::Wait, at(95)));
        assert_eq!(idle.check(at(100)), Patience::Ping);
        assert_eq!(idle.check(at(170)), Patience::End);
    }
}
