//! The hybrid logical clock: an order of writes that respects both the wall clock and what the writer had seen.
//!
//! A device stamps a write with the wall time it believes in. If it has seen a later stamp, it goes just beyond that one
//! instead, so that a write never loses to something its author knew. Devices may be wrong about the time by a year:
//! what a relay says about the time corrects the writes that were not sent yet ([`Clock::restamp`]).
//!
//! Pure: the local time is an argument, in milliseconds since 1970 UTC.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::protocol::bytes::decode_lower_hex;

/// Latest wall time of a stamp: 48 bits of milliseconds, the year 10889.
pub const WALL_MS_MAX: u64 = (1 << 48) - 1;

/// Which device wrote; chosen at random when a profile is made, so that no two stamps are ever equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device(pub u64);

impl Device {
    /// No real device: imported writes, which every device stamps alike.
    pub const IMPORT: Device = Device(0);

    /// Reads the 16 lower-case hex digits that [`fmt::Display`] writes.
    pub fn from_hex(hex: &str) -> Option<Self> {
        decode_lower_hex(hex).map(|bytes| Device(u64::from_be_bytes(bytes)))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A stamp of the hybrid logical clock, totally ordered.
///
/// Its text is `<wall ms: 12 hex digits>-<counter: 4>-<device: 16>`, so that the order of the texts is the order of the
/// stamps: an app in any language compares two stamps as strings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hlc {
    /// Milliseconds since 1970 UTC, at most [`WALL_MS_MAX`].
    pub wall_ms: u64,
    /// Tells apart the writes of one millisecond.
    pub counter: u16,
    /// The writer.
    pub device: Device,
}

impl Hlc {
    /// Before every stamp that a device makes.
    pub const ZERO: Hlc = Hlc { wall_ms: 0, counter: 0, device: Device(0) };

    /// The earliest stamp of a device at a wall time.
    pub fn at(wall_ms: u64, device: Device) -> Self {
        Hlc { wall_ms: wall_ms.min(WALL_MS_MAX), counter: 0, device }
    }

    /// The earliest stamp of `device` that comes after this one whatever device made it. A full counter carries into
    /// the wall time; at the end of time (the year 10889) there is no later stamp.
    pub fn after(self, device: Device) -> Self {
        match self.counter.checked_add(1) {
            Some(counter) => Hlc { counter, device, ..self },
            None if self.wall_ms < WALL_MS_MAX => Hlc::at(self.wall_ms + 1, device),
            None => Hlc { device, ..self },
        }
    }

    /// Whether a stamp may stand in an event of this `created_at` (seconds since 1970): judged from the event alone, so
    /// that all devices and relays agree. A relay that bounds `created_at` thereby bounds the stamp.
    pub fn is_valid_in(self, created_at: u64) -> bool {
        self.wall_ms <= created_at.saturating_mul(1000).saturating_add(999)
    }

    /// The least `created_at` in which this stamp is valid.
    pub fn second(self) -> u64 {
        self.wall_ms / 1000
    }
}

impl fmt::Display for Hlc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}-{:04x}-{}", self.wall_ms, self.counter, self.device)
    }
}

/// The text is not a stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a stamp is 12, 4 and 16 lower-case hex digits joined by '-'")]
pub struct BadStamp;

impl FromStr for Hlc {
    type Err = BadStamp;

    fn from_str(text: &str) -> Result<Self, BadStamp> {
        let (wall, rest) = text.split_once('-').ok_or(BadStamp)?;
        let (counter, device) = rest.split_once('-').ok_or(BadStamp)?;
        let wall: [u8; 6] = decode_lower_hex(wall).ok_or(BadStamp)?;
        let mut wide = [0; 8];
        wide[2..].copy_from_slice(&wall);
        Ok(Hlc {
            wall_ms: u64::from_be_bytes(wide),
            counter: u16::from_be_bytes(decode_lower_hex(counter).ok_or(BadStamp)?),
            device: Device::from_hex(device).ok_or(BadStamp)?,
        })
    }
}

impl Serialize for Hlc {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hlc {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// How a write was dated, kept until it is signed, so that it can be dated anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// What the device's own clock showed: milliseconds since 1970, right or wrong.
    pub local_ms: u64,
    /// The latest stamp that was certain when this was written: of a signed event, own or foreign, or of an own write
    /// that is dated for good. This write never gets a stamp below it.
    pub floor: Hlc,
    /// The stamp at present.
    pub stamp: Hlc,
    /// The stamp stays: a relay had told the time when it was given, or it is part of what is written (an import).
    #[serde(rename = "final")]
    pub is_final: bool,
}

/// One device's clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    device: Device,
    /// What to add to the local time to get the true one, as far as known.
    offset_ms: i64,
    /// A relay has told the time, and nothing has happened since that would make it doubtful.
    corrected: bool,
    /// The latest stamp in a signed event. It stands whatever the true time is.
    seen: Hlc,
    /// The latest stamp given for good to an own write.
    given: Hlc,
    /// The latest stamp of a write that is still to be dated anew.
    drafted: Hlc,
}

impl Clock {
    /// A clock that has seen nothing and believes the local time until a relay tells another.
    pub fn new(device: Device) -> Self {
        Clock { device, offset_ms: 0, corrected: false, seen: Hlc::ZERO, given: Hlc::ZERO, drafted: Hlc::ZERO }
    }

    /// Whose clock it is.
    pub fn device(&self) -> Device {
        self.device
    }

    /// What is added to the local time.
    pub fn offset_ms(&self) -> i64 {
        self.offset_ms
    }

    /// The true time, as far as known, when the local clock shows `local_ms`.
    pub fn true_ms(&self, local_ms: u64) -> u64 {
        local_ms.saturating_add_signed(self.offset_ms).min(WALL_MS_MAX)
    }

    /// Learns how far the local clock is off (true time less local time), as a relay's `Date` header tells. Drafts are
    /// to be dated anew after that: [`Clock::restamp`].
    pub fn correct(&mut self, offset_ms: i64) {
        self.offset_ms = offset_ms;
        self.corrected = true;
    }

    /// Whether what is written now is dated for good.
    pub fn is_corrected(&self) -> bool {
        self.corrected
    }

    /// No relay is there any more that would notice if somebody set the local clock: what is written from now on is
    /// dated anew at the next contact.
    pub fn doubt(&mut self) {
        self.corrected = false;
    }

    /// Takes note of a stamp in a valid signed event, own or foreign.
    pub fn observe(&mut self, seen: Hlc) {
        self.seen = self.seen.max(seen);
    }

    /// After a restart: takes note of a draft that waits. What is written next comes after it.
    pub fn resume(&mut self, draft: &Written) {
        let latest = if draft.is_final { &mut self.given } else { &mut self.drafted };
        *latest = draft.stamp.max(*latest);
    }

    /// Dates a write: beyond everything seen and everything written before. What a command writes in several forms is
    /// one write and has one date.
    pub fn write(&mut self, local_ms: u64) -> Written {
        let floor = self.seen.max(self.given);
        let stamp = dated(self.true_ms(local_ms), floor.max(self.drafted), self.device);
        let latest = if self.corrected { &mut self.given } else { &mut self.drafted };
        *latest = stamp;
        Written { local_ms, floor, stamp, is_final: self.corrected }
    }

    /// Dates for good all drafts that are not yet, in the order in which they were written, now that the clock shows
    /// `local_ms` and was corrected, or one of them is signed although nobody has told the time: another one that was
    /// written later must not be dated before it when somebody does. No draft gets a date in the future, even if the local clock was set back in the
    /// meantime; none falls below what its writer had seen or wrote before.
    pub fn restamp<'w>(&mut self, local_ms: u64, drafts: impl IntoIterator<Item = &'w mut Written>) {
        let now_ms = self.true_ms(local_ms);
        let (mut old, mut new) = (Hlc::ZERO, Hlc::ZERO);
        for written in drafts.into_iter().filter(|written| !written.is_final) {
            if written.stamp != old {
                let wall_ms = self.true_ms(written.local_ms).min(now_ms);
                (old, new) = (written.stamp, dated(wall_ms, written.floor.max(new), self.device));
            }
            written.stamp = new;
            written.is_final = true;
        }
        self.given = self.given.max(new);
        self.drafted = Hlc::ZERO;
    }
}

/// The earliest stamp of `device` not before `wall_ms` and after `floor`.
fn dated(wall_ms: u64, floor: Hlc, device: Device) -> Hlc {
    let wall = Hlc::at(wall_ms, device);
    if wall.wall_ms > floor.wall_ms { wall } else { floor.after(device) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEAR_MS: u64 = 365 * 86_400_000;
    const NOW: u64 = 1_700_000_000_000;

    fn stamp(wall_ms: u64, counter: u16, device: u64) -> Hlc {
        Hlc { wall_ms, counter, device: Device(device) }
    }

    /// The order of the texts is the order of the stamps, and the text is read back exactly.
    #[test]
    fn text_order_is_stamp_order() {
        let mut stamps = [
            stamp(NOW, 0, 9),
            stamp(NOW, 1, 1),
            stamp(NOW + 1, 0, 0),
            stamp(0, u16::MAX, u64::MAX),
            stamp(WALL_MS_MAX, 3, 7),
        ];
        stamps.sort();
        let texts: Vec<String> = stamps.iter().map(Hlc::to_string).collect();
        assert!(texts.is_sorted(), "{texts:?}");
        assert_eq!(stamp(NOW, 2, 0xab).to_string(), "018bcfe56800-0002-00000000000000ab");
        for (stamp, text) in stamps.iter().zip(&texts) {
            assert_eq!(text.parse(), Ok(*stamp));
        }
    }

    /// Anything but the exact form is refused.
    #[test]
    fn malformed_stamps() {
        let good = stamp(NOW, 2, 0xab).to_string();
        let upper = good.to_uppercase();
        for bad in
            ["", "-", "--", &good[1..], &good[..good.len() - 1], &upper, "018bcfe56800-0002", "x18bcfe56800-0002-0"]
        {
            assert_eq!(bad.parse::<Hlc>(), Err(BadStamp), "{bad}");
        }
    }

    /// The whole second of `created_at` is allowed and not a millisecond more.
    #[test]
    fn validity_is_judged_from_the_event_alone() {
        assert!(stamp(1_000_999, 0, 1).is_valid_in(1_000));
        assert!(!stamp(1_001_000, 0, 1).is_valid_in(1_000));
        assert!(stamp(WALL_MS_MAX, 0, 1).is_valid_in(u64::MAX));
    }

    /// A stamp goes beyond what was seen, also in the same millisecond, from a slow clock, and over a full counter.
    #[test]
    fn a_write_comes_after_what_was_seen() {
        let mut clock = Clock::new(Device(1));
        assert_eq!(clock.write(NOW).stamp, stamp(NOW, 0, 1));
        assert_eq!(clock.write(NOW).stamp, stamp(NOW, 1, 1));
        clock.observe(stamp(NOW + 500, 7, 9));
        assert_eq!(clock.write(NOW + 1).stamp, stamp(NOW + 500, 8, 1));
        assert_eq!(clock.write(NOW + 600).stamp, stamp(NOW + 600, 0, 1));
        clock.observe(stamp(NOW + 700, u16::MAX, 0));
        assert_eq!(clock.write(NOW + 700).stamp, stamp(NOW + 701, 0, 1));
        assert_eq!(stamp(WALL_MS_MAX, u16::MAX, 2).after(Device(1)), stamp(WALL_MS_MAX, u16::MAX, 1));
    }

    /// A clock a year fast or slow: after the correction the writes carry their true times, in their order.
    #[test]
    fn drafts_get_their_true_times() {
        for skew_ms in [YEAR_MS as i64, -(YEAR_MS as i64)] {
            let mut clock = Clock::new(Device(1));
            let local = |true_ms: u64| true_ms.saturating_add_signed(skew_ms);
            let mut drafts = [NOW, NOW, NOW + 5].map(|at| clock.write(local(at)));
            clock.correct(-skew_ms);
            clock.restamp(local(NOW + 60_000), &mut drafts);
            let stamps = drafts.map(|draft| draft.stamp);
            assert_eq!(stamps, [stamp(NOW, 0, 1), stamp(NOW, 1, 1), stamp(NOW + 5, 0, 1)]);
            assert_eq!(clock.write(local(NOW + 6)).stamp, stamp(NOW + 6, 0, 1));
        }
    }

    /// What the writer had seen stays below, a clock that was set back makes no date in the future, and final stamps stay.
    #[test]
    fn restamping_keeps_floors_and_stays_out_of_the_future() {
        let mut clock = Clock::new(Device(1));
        clock.observe(stamp(NOW, 4, 9));
        let mut drafts = vec![clock.write(NOW - YEAR_MS), clock.write(NOW + YEAR_MS)];
        let imported = Written { local_ms: 5, floor: Hlc::ZERO, stamp: stamp(5, 0, 0), is_final: true };
        drafts.insert(1, imported);
        // The second form of the last write.
        drafts.push(drafts[2]);
        clock.correct(0);
        clock.restamp(NOW + 10, &mut drafts);
        let stamps: Vec<Hlc> = drafts.iter().map(|draft| draft.stamp).collect();
        assert_eq!(stamps, [stamp(NOW, 5, 1), stamp(5, 0, 0), stamp(NOW + 10, 0, 1), stamp(NOW + 10, 0, 1)]);
        let dated = drafts.clone();
        clock.correct(1_000_000);
        clock.restamp(NOW + 20, &mut drafts);
        assert_eq!(drafts, dated, "dated for good");
        assert!(clock.write(NOW).is_final);
        clock.doubt();
        assert!(!clock.write(NOW).is_final);
    }
}
