//! What a running relay counts: for metrics, `sledge status` and `sledge top`.
//!
//! Plain numbers that only grow; each is written by whichever thread does the thing, without a lock, and read for a
//! report. No names of clients, keys or events.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// The first words of an `OK` text (NIP-01, NIP-42), in the order of [`Figures::refused`]. Others count as `error`.
pub const REASONS: [&str; 9] =
    ["error", "blocked", "invalid", "pow", "rate-limited", "restricted", "auth-required", "mute", "other"];

/// The counters.
#[derive(Debug, Default)]
pub struct Counters {
    /// Events that were stored, or passed on.
    stored: AtomicU64,
    /// Events that were there already, or are no longer wanted, and were answered with `true`.
    duplicate: AtomicU64,
    refused: [AtomicU64; REASONS.len()],
    /// Live events put into outboxes.
    pub deliveries: Counter,
    /// Messages of clients.
    pub messages: Counter,
    /// Bytes of them.
    pub message_bytes: Counter,
    /// Bytes written to clients.
    pub sent_bytes: Counter,
    /// Connections that shook hands.
    pub connections: Counter,
    /// Connections that were turned away for want of a place, or because their address is shut out.
    pub turned_away: Counter,
    /// Connections closed because they did not keep up with their events.
    pub too_slow: Counter,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `more` things.
    pub fn add(&self, more: usize) {
        self.0.fetch_add(more as u64, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    /// Counts an `OK` by its flag and text.
    pub fn answered(&self, accepted: bool, text: &str) {
        let counter = match (accepted, text.is_empty()) {
            (true, true) => &self.stored,
            (true, false) => &self.duplicate,
            (false, _) => &self.refused[reason_of(text)],
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The numbers as they are now.
    pub fn figures(&self) -> Figures {
        Figures {
            stored: self.stored.load(Ordering::Relaxed),
            duplicate: self.duplicate.load(Ordering::Relaxed),
            refused: self.refused.each_ref().map(|counter| counter.load(Ordering::Relaxed)),
            deliveries: self.deliveries.get(),
            messages: self.messages.get(),
            message_bytes: self.message_bytes.get(),
            sent_bytes: self.sent_bytes.get(),
            connections: self.connections.get(),
            turned_away: self.turned_away.get(),
            too_slow: self.too_slow.get(),
        }
    }
}

fn reason_of(text: &str) -> usize {
    let word = text.split(':').next().unwrap_or_default();
    REASONS.iter().position(|reason| *reason == word).unwrap_or(REASONS.len() - 1)
}

/// The numbers of [`Counters`] at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// Events stored or passed on.
    pub stored: u64,
    /// Events that were there already.
    pub duplicate: u64,
    /// Events refused, by the reasons of [`REASONS`].
    pub refused: [u64; REASONS.len()],
    /// Live events put into outboxes.
    pub deliveries: u64,
    /// Messages of clients.
    pub messages: u64,
    /// Bytes of them.
    pub message_bytes: u64,
    /// Bytes written to clients.
    pub sent_bytes: u64,
    /// Connections that shook hands.
    pub connections: u64,
    /// Connections that were turned away.
    pub turned_away: u64,
    /// Connections closed because they did not keep up.
    pub too_slow: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every answer is counted once, under its first word.
    #[test]
    fn answers_are_counted_by_their_reason() {
        let counters = Counters::default();
        for (accepted, text) in [
            (true, ""),
            (true, "duplicate: already have this event"),
            (false, "invalid: bad signature"),
            (false, "rate-limited: slow down"),
            (false, "what: ever"),
            (false, ""),
        ] {
            counters.answered(accepted, text);
        }
        let figures = counters.figures();
        assert_eq!((figures.stored, figures.duplicate), (1, 1));
        let by_reason = |reason| figures.refused[REASONS.iter().position(|known| *known == reason).expect("known")];
        assert_eq!(["invalid", "rate-limited", "other", "error"].map(by_reason), [1, 1, 2, 0]);
    }
}
