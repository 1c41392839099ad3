//! Pairs: a frequent op and the one after it in one handler, which saves the jump between them.
//!
//! The ops stay as they are, one for each instruction. Only the first one's handler is another: it runs both, and
//! goes on after the second. An op that needs the slow way goes there as if it had been alone.

use core::any::TypeId;

use crate::alu::{ADD, AND, CMP, SHL, SHR, SUB, TEST, XOR};
use crate::fast::{
    AluMI, AluRI, AluRM, AluRR, Call, ExtendM, ExtendR, FusedRI, FusedRR, Jcc, Jmp, Lea, Load,
    MovRI, MovRR, Pop, Push, Ret, ShiftRI, Store,
};
use crate::op::{End, Op, Out, Run, Sem, end_slow, tail_slow};
use crate::state::Core;

/// Conditions of branches.
const BELOW: u8 = 2;
const NOT_BELOW: u8 = 3;
const EQUAL: u8 = 4;
const NOT_EQUAL: u8 = 5;
const NOT_ABOVE: u8 = 6;
const ABOVE: u8 = 7;

// Each hands a list of types to the macro `then`, and what follows behind it.

macro_rules! bodies {
    ($then:ident $($more:tt)*) => {
        $then! { [
            MovRR<8>, MovRR<4>, MovRI<4>, Load<8>, Load<4>, Store<8>, Store<4>, Lea<8>, Push, Pop,
            ExtendR<1, 4, false>, ExtendM<1, 4, false>, AluRR<ADD, 8>, AluRR<ADD, 4>,
            AluRR<XOR, 8>, AluRR<XOR, 4>, AluRR<AND, 8>, AluRI<ADD, 8>, AluRI<SUB, 8>,
            AluRI<AND, 4>, AluRI<AND, 8>, ShiftRI<SHL, 8>, ShiftRI<SHR, 8>, ShiftRI<SHR, 4>
        ] $($more)* }
    };
}

macro_rules! ends {
    ($then:ident $($more:tt)*) => {
        $then! { [
            Jmp, Call, Ret,
            FusedRR<TEST, EQUAL, 8>, FusedRR<TEST, NOT_EQUAL, 8>,
            FusedRR<TEST, EQUAL, 4>, FusedRR<TEST, NOT_EQUAL, 4>,
            FusedRR<CMP, EQUAL, 8>, FusedRR<CMP, NOT_EQUAL, 8>,
            FusedRI<CMP, EQUAL, 4>, FusedRI<CMP, NOT_EQUAL, 4>,
            FusedRI<CMP, ABOVE, 4>, FusedRI<CMP, NOT_ABOVE, 4>
        ] $($more)* }
    };
}

macro_rules! comparisons {
    ($then:ident $($more:tt)*) => {
        $then! { [
            AluMI<CMP, 1>, AluMI<CMP, 4>, AluMI<CMP, 8>, AluMI<TEST, 1>, AluRM<CMP, 4>,
            AluRM<CMP, 8>, AluRI<CMP, 1>, AluRR<TEST, 1>, AluRI<TEST, 1>
        ] $($more)* }
    };
}

macro_rules! branches {
    ($then:ident $($more:tt)*) => {
        $then! { [
            Jcc<BELOW>, Jcc<NOT_BELOW>, Jcc<EQUAL>, Jcc<NOT_EQUAL>, Jcc<NOT_ABOVE>, Jcc<ABOVE>
        ] $($more)* }
    };
}

macro_rules! place {
    ([$($t:ty),*] $id:ident) => {
        [$(TypeId::of::<$t>()),*].iter().position(|t| *t == $id)
    };
}

/// A row for each of the first list: the handlers that `make` gives with each of the second.
macro_rules! table {
    ($first:tt $second:ident $make:ident) => {
        $second!(rows $first $make)
    };
}

macro_rules! rows {
    ($second:tt [$($first:ty),*] $make:ident) => {
        &[$(row!($make $first, $second)),*]
    };
}

macro_rules! row {
    ($make:ident $first:ty, [$($second:ty),*]) => {
        &[$($make::<$first, $second>),*]
    };
}

pub(crate) static TWO: &[&[Run]] = bodies!(table bodies pair);
pub(crate) static WITH_END: &[&[Run]] = bodies!(table ends pair_end);
pub(crate) static COMPARISON_AND_BRANCH: &[&[Run]] = comparisons!(table branches pair_end);

/// Place of an op's type in one of the lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Other,
    Body(u8),
    End(u8),
    Comparison(u8),
    Branch(u8),
}

impl Kind {
    pub(crate) fn of<T: 'static>() -> Self {
        let id = TypeId::of::<T>();
        let body = bodies!(place id).map(|n| Self::Body(n as u8));
        let end = || ends!(place id).map(|n| Self::End(n as u8));
        let comparison = || comparisons!(place id).map(|n| Self::Comparison(n as u8));
        let branch = || branches!(place id).map(|n| Self::Branch(n as u8));
        body.or_else(end)
            .or_else(comparison)
            .or_else(branch)
            .unwrap_or(Self::Other)
    }
}

/// The handler of two ops, if they make a pair.
fn handler(first: Kind, second: Kind) -> Option<Run> {
    let (table, row, column) = match (first, second) {
        (Kind::Body(a), Kind::Body(b)) => (TWO, a, b),
        (Kind::Body(a), Kind::End(b)) => (WITH_END, a, b),
        (Kind::Comparison(a), Kind::Branch(b)) => (COMPARISON_AND_BRANCH, a, b),
        _ => return None,
    };
    let row = table.get(usize::from(row))?;
    row.get(usize::from(column)).copied()
}

/// Gives the ops of a block the handlers of pairs.
pub(crate) fn join(ops: &mut [Op]) {
    for n in 1..ops.len() {
        if let Some(run) = handler(ops[n - 1].kind, ops[n].kind) {
            ops[n - 1].run = run;
        }
    }
}

fn pair<A: Sem, B: Sem>(c: &mut Core, ops: &[Op]) -> Out {
    let [first, rest @ ..] = ops else {
        return Out::Stop;
    };
    if A::exec::<false>(c, first).is_err() {
        return tail_slow::<A>(c, ops);
    }
    let [second, after @ ..] = rest else {
        return Out::Stop;
    };
    if B::exec::<false>(c, second).is_err() {
        return tail_slow::<B>(c, rest);
    }
    match after {
        [next, ..] => (next.run)(c, after),
        [] => Out::Stop,
    }
}

fn pair_end<A: Sem, B: End>(c: &mut Core, ops: &[Op]) -> Out {
    let [first, rest @ ..] = ops else {
        return Out::Stop;
    };
    if A::exec::<false>(c, first).is_err() {
        return tail_slow::<A>(c, ops);
    }
    let [second, ..] = rest else {
        return Out::Stop;
    };
    match B::exec::<false>(c, second) {
        Ok(out) => out,
        Err(_) => end_slow::<B>(c, rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_have_a_handler_for_each_pair_of_the_lists() {
        assert_eq!(Kind::of::<MovRR<8>>(), Kind::Body(0));
        assert_eq!(Kind::of::<Ret>(), Kind::End(2));
        assert_eq!(Kind::of::<MovRR<2>>(), Kind::Other);
        let last = Kind::of::<ShiftRI<SHR, 4>>();
        assert!(handler(last, last).is_some());
        assert!(handler(last, Kind::of::<FusedRI<CMP, NOT_ABOVE, 4>>()).is_some());
        let branch = Kind::of::<Jcc<ABOVE>>();
        assert!(handler(Kind::of::<AluRI<TEST, 1>>(), branch).is_some());
        assert!(handler(last, branch).is_none());
        assert!(handler(branch, last).is_none());
    }
}
