//! Range-based set reconciliation (NIP-77, Negentropy protocol version 1), both sides.
//!
//! In: the other side's message and a [`Set`] of one's own. Out: the message to send back and, at the side that began,
//! which events only one of the two has. Pure: where the set lies, and whether sums over it are counted or looked up, is
//! the set's business. One message is answered range by range ([`Exchange::step`]), so whoever answers many at a
//! time can change over in between.
//!
//! Nothing is kept from one message to the next: each stands for itself, so a set may change meanwhile. What the other
//! side sends is bounded by the length of its message; nothing is reserved on its word.

mod wire;

#[cfg(test)]
mod tests;

use std::collections::HashSet;

use crate::protocol::EventId;
use crate::protocol::item::{Item, Sum};

pub use wire::{Bound, Malformed};
use wire::{Mode, Reader, Writer};

/// Version byte of the protocol.
pub const VERSION: u8 = 0x61;
/// Versions that there may come to be; anything else is no version.
const VERSIONS: std::ops::RangeInclusive<u8> = 0x60..=0x6f;

/// Smallest bound on a message: below it, one range's answer does not fit.
pub const FRAME_BYTES_MIN: usize = 4_096;
/// Room that is left in a message for the range that says "and the rest".
const FRAME_SPARE_BYTES: usize = 200;

/// Into how many parts a range is cut whose sums differ.
const PARTS: usize = 16;
/// A range of fewer events is told event by event.
const LISTED_BELOW: u64 = 2 * PARTS as u64;

/// A set of events in NIP-77's order. Ranges are `from <= item < to`.
pub trait Set {
    /// Why a set cannot be read.
    type Error;

    /// How many events lie in a range, and the sum of their ids.
    ///
    /// # Errors
    /// When the set cannot be read.
    fn sum(&mut self, from: &Item, to: &Item) -> Result<Sum, Self::Error>;

    /// Appends the events of a range in order, at most `max` of them.
    ///
    /// # Errors
    /// When the set cannot be read.
    fn items(&mut self, from: &Item, to: &Item, max: usize, out: &mut Vec<Item>) -> Result<(), Self::Error>;

    /// Appends bounds within a range, ascending, that cut it into about `parts` parts of about the same number of
    /// events. The range has at least `2 * parts` events; at least one bound is given, each above `from` and below `to`.
    ///
    /// # Errors
    /// When the set cannot be read.
    fn cuts(&mut self, from: &Item, to: &Item, parts: usize, out: &mut Vec<Bound>) -> Result<(), Self::Error>;
}

/// Events in memory, in order and each once: the plain set, and the oracle for others.
impl Set for Vec<Item> {
    type Error = std::convert::Infallible;

    fn sum(&mut self, from: &Item, to: &Item) -> Result<Sum, Self::Error> {
        Ok(range(self, from, to).iter().collect())
    }

    fn items(&mut self, from: &Item, to: &Item, max: usize, out: &mut Vec<Item>) -> Result<(), Self::Error> {
        out.extend(range(self, from, to).iter().take(max));
        Ok(())
    }

    fn cuts(&mut self, from: &Item, to: &Item, parts: usize, out: &mut Vec<Bound>) -> Result<(), Self::Error> {
        out.extend(cuts_of(range(self, from, to), parts));
        Ok(())
    }
}

/// The part of an ordered list that lies in a range.
pub fn range<'i>(items: &'i [Item], from: &Item, to: &Item) -> &'i [Item] {
    let start = items.partition_point(|item| item < from);
    let end = items.partition_point(|item| item < to);
    items.get(start..end).unwrap_or_default()
}

/// The shortest bounds that cut an ordered list into `parts` parts of the same length, the earlier ones longer by one
/// where it does not come out even.
pub fn cuts_of(items: &[Item], parts: usize) -> impl Iterator<Item = Bound> + '_ {
    let (each, longer) = (items.len() / parts, items.len() % parts);
    let starts = (1..parts).map(move |part| part * each + part.min(longer));
    starts.filter_map(|start| Some(Bound::between(items.get(start.checked_sub(1)?)?, items.get(start)?)))
}

/// The first message of a reconciliation, at most about `frame_bytes_max` bytes long.
///
/// # Errors
/// Those of the set.
pub fn begin<S: Set>(set: &mut S) -> Result<Vec<u8>, S::Error> {
    let mut out = Writer::new();
    split(set, &Item::FIRST, &Bound::END, &mut out)?;
    Ok(out.into_bytes())
}

/// Tells a range whose sums differ in more detail.
fn split<S: Set>(set: &mut S, from: &Item, to: &Bound, out: &mut Writer) -> Result<(), S::Error> {
    if set.sum(from, &to.item())?.count < LISTED_BELOW {
        let mut items = Vec::new();
        set.items(from, &to.item(), LISTED_BELOW as usize, &mut items)?;
        out.ids(to, items.iter().map(|item| &item.id));
        return Ok(());
    }
    let mut bounds = Vec::with_capacity(PARTS);
    set.cuts(from, &to.item(), PARTS, &mut bounds)?;
    bounds.push(*to);
    let mut start = *from;
    for bound in bounds {
        let end = bound.item();
        out.fingerprint(&bound, set.sum(&start, &end)?.fingerprint());
        start = end;
    }
    Ok(())
}

/// Which side answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that began: it learns what differs.
    Initiator,
    /// The other one.
    Responder,
}

/// Why a message is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure<E> {
    /// It is not what it should be.
    Malformed(Malformed),
    /// One's own set cannot be read.
    Set(E),
}

impl<E> From<Malformed> for Failure<E> {
    fn from(malformed: Malformed) -> Self {
        Failure::Malformed(malformed)
    }
}

/// How far an answer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There are further ranges.
    More,
    /// The answer is complete.
    Done,
}

/// One message being answered.
#[derive(Debug)]
pub struct Exchange {
    side: Side,
    frame_bytes_max: usize,
    input: Reader,
    out: Writer,
    /// Where the next range begins.
    from: Bound,
    /// Ranges before `from` about which nothing needs to be said wait to be told together.
    skipping: bool,
    /// Behind the last range that was told.
    told_up_to: Item,
    answered: bool,
    /// Events that only this side has, as found by this message.
    pub have: Vec<Item>,
    /// Events that only the other side has, as found by this message.
    pub need: Vec<EventId>,
}

impl Exchange {
    /// Begins to answer `message` with at most `frame_bytes_max` bytes, which are [`FRAME_BYTES_MIN`] or more.
    ///
    /// # Errors
    /// [`Malformed`] when it has no known version. A responder answers other versions with its own.
    pub fn new(side: Side, message: Vec<u8>, frame_bytes_max: usize) -> Result<Exchange, Malformed> {
        let version = *message.first().ok_or(Malformed::Empty)?;
        let mut input = Reader::new(message, 1);
        if version != VERSION {
            if side == Side::Initiator || !VERSIONS.contains(&version) {
                return Err(Malformed::Version(version));
            }
            input = Reader::new(Vec::new(), 0);
        }
        Ok(Exchange {
            side,
            frame_bytes_max: frame_bytes_max.max(FRAME_BYTES_MIN),
            input,
            out: Writer::new(),
            from: Bound::START,
            skipping: false,
            told_up_to: Item::FIRST,
            answered: false,
            have: Vec::new(),
            need: Vec::new(),
        })
    }

    /// Answers the next range.
    ///
    /// # Errors
    /// [`Failure`]; the message is not to be answered then.
    pub fn step<S: Set>(&mut self, set: &mut S) -> Result<Step, Failure<S::Error>> {
        if self.answered || self.input.is_empty() {
            return Ok(Step::Done);
        }
        let to = self.input.bound()?;
        if to.item() < self.from.item() {
            return Err(Malformed::Order.into());
        }
        let written = self.out.len();
        match self.input.mode()? {
            Mode::Skip => self.skipping = true,
            Mode::Fingerprint => self.compare(set, &to)?,
            Mode::Ids if self.side == Side::Initiator => self.learn(set, &to)?,
            Mode::Ids => return self.list(set, &to),
        }
        if self.out.len() + FRAME_SPARE_BYTES > self.frame_bytes_max {
            self.out.truncate(written);
            return self.tell_rest(set).map_err(Failure::Set);
        }
        if self.out.len() > written {
            self.told_up_to = to.item();
        }
        self.from = to;
        Ok(Step::More)
    }

    /// The whole answer; an initiator has nothing more to ask when [`Exchange::is_settled`].
    pub fn into_answer(self) -> Vec<u8> {
        self.out.into_bytes()
    }

    /// Whether the answer asks nothing more: the reconciliation is complete.
    pub fn is_settled(&self) -> bool {
        self.out.len() == 1
    }

    /// Their fingerprint of a range: equal ends the matter, else it is told in more detail.
    fn compare<S: Set>(&mut self, set: &mut S, to: &Bound) -> Result<(), Failure<S::Error>> {
        let theirs = self.input.fingerprint()?;
        let from = self.from.item();
        let ours = set.sum(&from, &to.item()).map_err(Failure::Set)?;
        if ours.fingerprint() == theirs {
            self.skipping = true;
            return Ok(());
        }
        self.tell_skipped();
        split(set, &from, to, &mut self.out).map_err(Failure::Set)
    }

    /// Their ids of a range: what differs is known.
    fn learn<S: Set>(&mut self, set: &mut S, to: &Bound) -> Result<(), Failure<S::Error>> {
        let mut theirs: HashSet<EventId> = self.input.ids()?.collect();
        let mut ours = Vec::new();
        set.items(&self.from.item(), &to.item(), usize::MAX, &mut ours).map_err(Failure::Set)?;
        self.have.extend(ours.into_iter().filter(|item| !theirs.remove(&item.id)));
        self.need.extend(theirs);
        self.skipping = true;
        Ok(())
    }

    /// Their ids of a range, at the side that does not learn from them: answered with one's own, as far as they fit.
    fn list<S: Set>(&mut self, set: &mut S, to: &Bound) -> Result<Step, Failure<S::Error>> {
        self.input.ids()?.for_each(drop);
        self.tell_skipped();
        let room = (self.frame_bytes_max - FRAME_SPARE_BYTES).saturating_sub(self.out.len()) / 32 + 1;
        let mut ours = Vec::new();
        set.items(&self.from.item(), &to.item(), room + 1, &mut ours).map_err(Failure::Set)?;
        let end = ours.get(room).map_or(*to, Bound::of);
        ours.truncate(room);
        self.out.ids(&end, ours.iter().map(|item| &item.id));
        (self.from, self.told_up_to) = (end, end.item());
        if self.out.len() + FRAME_SPARE_BYTES > self.frame_bytes_max || end != *to {
            return self.tell_rest(set).map_err(Failure::Set);
        }
        Ok(Step::More)
    }

    /// Ends a message that would grow too long: one fingerprint for everything behind what was told.
    fn tell_rest<S: Set>(&mut self, set: &mut S) -> Result<Step, S::Error> {
        let rest = set.sum(&self.told_up_to, &Item::END)?;
        self.out.fingerprint(&Bound::END, rest.fingerprint());
        self.answered = true;
        Ok(Step::Done)
    }

    fn tell_skipped(&mut self) {
        if std::mem::take(&mut self.skipping) {
            self.out.skip(&self.from);
        }
    }
}
