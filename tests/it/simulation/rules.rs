//! The rules that the laws rest on, each with a switch: with the rule off, a law must be seen to break.

/// A rule of the engine, of a relay or of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// State follows from the set of events, not from their order.
    OrderPlaysNoPart,
    /// Of two versions the relay keeps the one that the client keeps.
    RelaysKeepTheWinner,
    /// A deletion takes what is as old as itself.
    DeletionsWinTies,
    /// Who names a version says all that it said.
    HeadsSayEverything,
    /// Validity is judged from the event, not by one's own clock.
    ValidityFromTheEvent,
    /// A merge is published only if no head says as much.
    SilenceWhenSaid,
    /// A write is dated beyond what its writer saw.
    Floor,
    /// Drafts are dated anew when a relay tells the time.
    Restamp,
    /// Catch-up compares sets; it does not ask for what is newer than the newest.
    SetsAreCompared,
    /// A debt is paid by the relay's answer, not by sending.
    AnswersSettle,
    /// A draft is signed once.
    FrozenOnce,
}

/// Which rules hold in a run: all, or all but one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    off: Option<Rule>,
}

impl Rules {
    pub fn without(rule: Rule) -> Rules {
        Rules { off: Some(rule) }
    }

    pub fn hold(self, rule: Rule) -> bool {
        self.off != Some(rule)
    }
}
