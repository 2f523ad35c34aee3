//! Chats, settings and training data over Nostr events: what is written, how it is dated, how it merges, and how two
//! sides find out what they lack.
//!
//! In: commands of an app, verified events, answers of relays, the time, random numbers. Out: state, drafts of events,
//! and what to send next. Never touches a socket, a disk, a clock or a random number generator: one seeded simulation
//! (`tests/it/simulation`) owns them all and checks the laws.
//!
//! # How a driver goes about it
//!
//! - A command ([`chat::ChatView`], [`settings::Settings::set`], [`training::Training`]) gives an [`draft::Op`]. The driver
//!   dates it ([`clock::Clock::write`]), once for all forms of one write and anew for each of several, and owes it to relays
//!   ([`outbox::Outbox::queue`]); when the change is durable, the write is made.
//! - Chats of the older shape ([`import::explode`]) give drafts that bring their dates. They are queued as they are, and the
//!   clock is shown the dates ([`clock::Clock::resume`]).
//! - A link comes up: the relay's `Date` corrects the clock, drafts are dated for good ([`outbox::Outbox::restamp`]), what is
//!   in the wrong form for this relay is settled ([`outbox::Outbox::settle_unsuited`]). Where a relay tells no time, drafts
//!   are dated for good when the first of them is signed.
//! - What stands for itself goes out at once: messages, deletions, training data. What takes the place of another version
//!   and says all that is known, heads of chats and settings, waits until everything of the relay is fetched and absorbed
//!   ([`Collections::absorb`], [`outbox::Outbox::fetched`]): so that what is signed knows what is there. It waits again
//!   ([`outbox::Outbox::fetching`]) when the relay shows more, since the keys are proven now.
//! - [`outbox::Step::Sign`]: [`Collections::build`] makes one event of all drafts that it tells, the driver signs it, makes
//!   [`outbox::Outbox::freeze`]'s change durable and absorbs it like any other event.
//! - Events come: they are absorbed, and what is due of heads ([`Collections::heads_due`]) is owed before the cache takes
//!   them, since it lets go of the heads that they replace.
//! - Caught up: [`Collections::due`] says what is to be said again. At rest it is empty.
//! - The app sees state and drafts together: [`Collections::chat_view`], [`settings::Settings::view`].
//! - All links are gone: [`clock::Clock::doubt`]. After a restart: [`clock::Clock::resume`] for every draft that waits.
//! - A relay that answers an upload of the cache with `replaced:`, `deleted:` or `duplicate: a newer version` knows better
//!   than the cache; what it named is not offered again. For a version of settings that is the end: nobody wants it.
//!
//! # What is not promised
//!
//! Relays keep one version of a chat's head. If two devices change different fields of one head at the same time, one of
//! them is gone from the relay until the other device, or any that saw it, says it again. If that device never comes
//! back and nobody saw its version, its fields are lost. Messages, settings and training data do not have this gap.
#![doc = include_str!("shapes.md")]

pub mod chat;
pub mod cipher;
pub mod clock;
pub mod collections;
pub mod draft;
pub mod fields;
pub mod import;
pub mod nip44;
pub mod outbox;
pub mod reconcile;
pub mod settings;
pub mod shape;
pub mod slots;
#[cfg(test)]
pub(crate) mod testing;
pub mod training;

pub use collections::{Absorbed, Collections};
