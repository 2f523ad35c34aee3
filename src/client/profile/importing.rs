//! Taking in chats of the older shape.

use super::Profile;
use crate::client::cache::event_of;
use crate::client::outbox::OutboxError;
use crate::protocol::{Event, Filter};
use crate::store::StoreError;
use crate::sync::import::{self, OldChat, Tally};
use crate::sync::outbox::Content;
use crate::sync::shape::CHAT;

impl Profile {
    /// Owes what is new of old chats to the relays that may have it, all or none, dated as it was; what became of each
    /// message. It is durable when this returns and part of what the app sees. Taking the same chats again adds nothing,
    /// whatever became of the first time: so many chats are taken in portions, and from the beginning after a crash.
    ///
    /// # Errors
    /// [`OutboxError`]; nothing was taken then.
    pub fn import(&self, old: &[OldChat]) -> Result<Tally, OutboxError> {
        let mut state = self.state();
        let state = &mut *state;
        let local_ms = self.world.now_ms();
        let now_ms = state.clock.true_ms(local_ms);
        self.collections(state)?;
        let chats = &state.collections.as_ref().expect("made above").chats;
        let rules = state.outbox.rules();
        let imported = import::explode(chats, self.keys.pubkey(), old, |key| rules.waits(key), now_ms);
        let mut things = Vec::with_capacity(imported.drafts.len());
        let mut dates = Vec::with_capacity(imported.drafts.len());
        for mut draft in imported.drafts {
            // It waits since now, however old it is.
            draft.written.local_ms = local_ms;
            dates.push(draft.written);
            let relays = self.relays_for_draft(&draft)?;
            things.push((Content::Draft(Box::new(draft)), relays));
        }
        if !things.is_empty() {
            state.outbox.queue(things)?;
            dates.iter().for_each(|written| state.clock.resume(written));
            self.tell_owed(state);
        }
        Ok(imported.tally)
    }

    /// The chat of the older shape that an event of the user's holds; `None` for any other event.
    pub fn old_chat(&self, event: &Event) -> Option<OldChat> {
        import::from_event(event, &self.cipher)
    }

    /// The chats of the older shape among the events that are here.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn old_chats(&self) -> Result<Vec<OldChat>, StoreError> {
        let (authors, kinds) = (Some(vec![self.keys.pubkey()]), Some(vec![CHAT]));
        let filter = Filter { authors, kinds, ..Filter::default() };
        let mut chats = Vec::new();
        // Nearly all of them are messages of the present shape: not to be held all at once.
        self.cache.for_each(&[filter], self.now_secs(), |row| {
            chats.extend(event_of(row).and_then(|event| self.old_chat(&event)));
        })?;
        Ok(chats)
    }
}
