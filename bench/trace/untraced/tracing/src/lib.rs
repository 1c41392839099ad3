//! The part of tracing's interface that the library uses, doing nothing: no event, no span, no level
//! that is ever on.
#![no_std]

#[macro_export]
macro_rules! trace {
    ($($argument:tt)*) => {
        ()
    };
}

#[macro_export]
macro_rules! debug {
    ($($argument:tt)*) => {
        ()
    };
}

#[macro_export]
macro_rules! info {
    ($($argument:tt)*) => {
        ()
    };
}

#[macro_export]
macro_rules! warn {
    ($($argument:tt)*) => {
        ()
    };
}

#[macro_export]
macro_rules! error {
    ($($argument:tt)*) => {
        ()
    };
}

#[macro_export]
macro_rules! debug_span {
    ($($argument:tt)*) => {
        $crate::Span
    };
}

#[macro_export]
macro_rules! trace_span {
    ($($argument:tt)*) => {
        $crate::Span
    };
}

/// A level that is never on.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Level;

impl Level {
    pub const TRACE: Level = Level;
}

impl PartialEq<level_filters::LevelFilter> for Level {
    fn eq(&self, _: &level_filters::LevelFilter) -> bool {
        false
    }
}

impl PartialOrd<level_filters::LevelFilter> for Level {
    #[inline(always)]
    fn partial_cmp(&self, _: &level_filters::LevelFilter) -> Option<core::cmp::Ordering> {
        None
    }
}

pub mod level_filters {
    /// A filter that lets nothing through.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct LevelFilter;

    impl LevelFilter {
        #[inline(always)]
        pub const fn current() -> Self {
            Self
        }
    }

    pub const STATIC_MAX_LEVEL: LevelFilter = LevelFilter;
}

/// A span of nothing.
#[derive(Clone, Debug)]
pub struct Span;

impl Span {
    #[inline(always)]
    pub const fn entered(self) -> span::EnteredSpan {
        span::EnteredSpan
    }
}

pub mod span {
    /// A span of nothing that is entered.
    #[derive(Debug)]
    pub struct EnteredSpan;
}
