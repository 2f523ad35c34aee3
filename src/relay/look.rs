//! A second look at an event with a wrong signature: one that is stored already is a duplicate whatever comes with it, as
//! everywhere, but a store that others share cannot tell that at hand. A query thread asks it.

use std::sync::Arc;

use super::fanout::Fanout;
use super::ingest::Rejection;
use super::outbox::{Outbox, Outgoing};
use crate::protocol::verify::Invalid;
use crate::protocol::{EventId, message};
use crate::store::Store;

/// What is still to be answered.
pub(super) struct Look {
    pub(super) outbox: Arc<Outbox>,
    pub(super) fanout: Arc<Fanout>,
    pub(super) id: EventId,
}

impl Look {
    /// Asks and answers.
    pub(super) fn turn(self, store: &dyn Store) {
        let rejection = on_second_look(store, &self.id, Rejection::Invalid(Invalid::Signature));
        let (accepted, text) = (rejection.is_accepted(), rejection.to_string());
        self.fanout.counters().answered(accepted, &text);
        self.outbox.push(Outgoing::Answer(message::ok(&self.id, accepted, &text)));
    }
}

/// Whether a rejection depends on what the store cannot tell at hand.
pub(super) fn is_open(store: &dyn Store, id: &EventId, rejection: &Rejection) -> bool {
    *rejection == Rejection::Invalid(Invalid::Signature) && matches!(store.contains_at_hand(id), Ok(None))
}

/// The rejection with the store asked, which may take a while. One that cannot tell leaves it as it is.
pub(super) fn on_second_look(store: &dyn Store, id: &EventId, rejection: Rejection) -> Rejection {
    match is_open(store, id, &rejection) && store.contains(id).unwrap_or(false) {
        true => Rejection::Duplicate,
        false => rejection,
    }
}
