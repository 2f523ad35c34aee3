//! Who is next: the queries that wait for a thread, in an order that keeps short ones short.
//!
//! New queries go before resumed ones, so that a short question waits for a time slice and not for the long ones that are
//! open. But only a few of each connection do: whoever asks many things at once waits behind everybody else.

use std::collections::{HashMap, VecDeque};

use super::look::Look;
use super::negotiation::Negotiation;
use super::query::Job;

/// After so many new queries in a row a resumed one has its turn, so that none waits for ever.
const NEW_IN_A_ROW_MAX: u32 = 8;

/// New queries of one connection that go before resumed ones.
const IN_FRONT_MAX: u32 = 4;

/// What a thread works on for one turn.
pub(super) enum Work {
    Query(Job),
    Negotiation(Box<Negotiation>),
    Look(Look),
}

/// See the module.
#[derive(Default)]
pub(super) struct RunQueue {
    new: VecDeque<Work>,
    resumed: VecDeque<Work>,
    new_in_a_row: u32,
    /// Queries in `new`, by connection.
    in_front: HashMap<u64, u32>,
    pub(super) stopping: bool,
}

impl RunQueue {
    /// One that takes and gives nothing more.
    pub(super) fn stopped() -> Self {
        RunQueue { stopping: true, ..RunQueue::default() }
    }

    /// Adds what has not had a turn yet.
    pub(super) fn begin(&mut self, work: Work) {
        if let Work::Query(job) = &work {
            let in_front = self.in_front.entry(job.connection()).or_insert(0);
            if *in_front >= IN_FRONT_MAX {
                return self.resumed.push_back(work);
            }
            *in_front += 1;
        }
        self.new.push_back(work);
    }

    /// Adds what has had a turn.
    pub(super) fn resume(&mut self, work: Work) {
        self.resumed.push_back(work);
    }

    /// Takes what is next.
    pub(super) fn next(&mut self) -> Option<Work> {
        let resumed_first = self.new_in_a_row >= NEW_IN_A_ROW_MAX && !self.resumed.is_empty();
        if !resumed_first && let Some(work) = self.new.pop_front() {
            self.new_in_a_row += 1;
            if let Work::Query(job) = &work {
                self.leave_front(job.connection());
            }
            return Some(work);
        }
        self.new_in_a_row = 0;
        self.resumed.pop_front()
    }

    fn leave_front(&mut self, connection: u64) {
        if let Some(in_front) = self.in_front.get_mut(&connection) {
            *in_front -= 1;
            if *in_front == 0 {
                self.in_front.remove(&connection);
            }
        }
    }

    /// How much waits.
    pub(super) fn len(&self) -> usize {
        self.new.len() + self.resumed.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::protocol::Visibility;
    use crate::protocol::testing::NOW;
    use crate::relay::outbox::{Outbox, Serial};

    fn job(outbox: &Arc<Outbox>, serial: Serial) -> Work {
        Work::Query(Job::count(outbox, serial, Vec::new(), Visibility::everything(), NOW))
    }

    /// The serials in the order of their turns.
    fn order(queue: &mut RunQueue) -> Vec<Serial> {
        let serial = |work| match work {
            Work::Query(job) => job.serial(),
            Work::Negotiation(_) | Work::Look(_) => unreachable!("only queries were queued"),
        };
        std::iter::from_fn(|| queue.next()).map(serial).collect()
    }

    /// New queries go first, but not for ever.
    #[test]
    fn resumed_queries_have_their_turn() {
        let mut queue = RunQueue::default();
        queue.resume(job(&Outbox::new(0, 1 << 20), 100));
        (1..21).for_each(|n| queue.begin(job(&Outbox::new(n, 1 << 20), n)));
        let order = order(&mut queue);
        assert_eq!(order.iter().position(|serial| *serial == 100), Some(NEW_IN_A_ROW_MAX as usize));
        assert_eq!((order.len(), queue.len(), queue.in_front.len()), (21, 0, 0));
    }

    /// Sixty heavy questions of one connection put four turns in front of a light one of another, not sixty.
    #[test]
    fn many_questions_of_one_connection_wait_behind_those_of_others() {
        let (heavy, light) = (Outbox::new(1, 1 << 20), Outbox::new(2, 1 << 20));
        let mut queue = RunQueue::default();
        (0..60).for_each(|n| queue.begin(job(&heavy, n)));
        queue.begin(job(&light, 100));
        let order = order(&mut queue);
        assert_eq!(order.iter().position(|serial| *serial == 100), Some(IN_FRONT_MAX as usize));
        let heavies: Vec<Serial> = order.into_iter().filter(|serial| *serial < 100).collect();
        assert_eq!(heavies, (0..60).collect::<Vec<_>>(), "its own stay in order");
        queue.begin(job(&heavy, 7));
        assert_eq!(queue.in_front.get(&1), Some(&1), "and it may go in front again");
    }
}
