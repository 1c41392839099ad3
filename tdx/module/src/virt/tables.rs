//! The CPUID leaves and MSRs of a TD, as data: `tables/cpuid.csv`, `cpuid_xfam.csv` and `msrs.csv`.

use std::sync::LazyLock;

/// Registers of a CPUID leaf: EAX, EBX, ECX, EDX.
pub(crate) type Quad = [u32; 4];

/// Sub-leaf of a row for which the sub-leaf does not matter.
pub(crate) const ANY: u32 = u32::MAX;

/// A row of the CPUID table. Its index is the order of checks and of the next-identifier chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CpuidRow {
    pub(crate) leaf: u32,
    pub(crate) subleaf: u32,
    /// Always #VE.
    pub(crate) faulting: bool,
    /// Bits that are 0 unless a rule sets them.
    pub(crate) fixed0: Quad,
    pub(crate) fixed1: Quad,
    /// The host can configure the row,
    pub(crate) configurable: bool,
    /// these bits freely,
    pub(crate) config_direct: Quad,
    /// and these to 0.
    pub(crate) allow_direct: Quad,
}

/// Bits of a leaf that go with an XFAM bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct XfamRow {
    pub(crate) leaf: u32,
    pub(crate) subleaf: u32,
    pub(crate) xfam_bit: u32,
    pub(crate) mask: Quad,
}

/// Condition under which an access to an MSR exits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Exits {
    Never,
    Always,
    /// Unless the TD has the feature.
    Without(Feature),
}

/// A feature that gives a TD its MSRs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Feature {
    Perfmon,
    Pks,
    Tsx,
    Waitpkg,
    Cet,
    Lbr,
    Pt,
    Uintr,
    Xfd,
    /// By the address.
    OfAddress,
}

/// Reaction of the module to an access that exits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    Ve,
    Gp,
    /// #GP if the TD's CPU does not have the MSR, else #VE.
    GpOrVe,
    /// Answers it.
    Other,
    /// Cannot happen.
    Unexpected,
}

/// MSRs that are treated alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MsrRow {
    pub(crate) first: u32,
    pub(crate) last: u32,
    pub(crate) read: (Exits, Action),
    pub(crate) write: (Exits, Action),
}

pub(crate) static CPUID: LazyLock<Vec<CpuidRow>> =
    LazyLock::new(|| rows(include_str!("tables/cpuid.csv"), cpuid_row));
pub(crate) static XFAM: LazyLock<Vec<XfamRow>> =
    LazyLock::new(|| rows(include_str!("tables/cpuid_xfam.csv"), xfam_row));
pub(crate) static MSRS: LazyLock<Vec<MsrRow>> =
    LazyLock::new(|| rows(include_str!("tables/msrs.csv"), msr_row));

/// The row of a leaf and sub-leaf.
pub(crate) fn cpuid_index(leaf: u32, subleaf: u32) -> Option<usize> {
    CPUID
        .iter()
        .position(|r| r.leaf == leaf && (r.subleaf == ANY || r.subleaf == subleaf))
}

pub(crate) fn msr(address: u32) -> Option<&'static MsrRow> {
    MSRS.iter().find(|r| (r.first..=r.last).contains(&address))
}

fn rows<T>(text: &'static str, parse: fn(&[&str]) -> Option<T>) -> Vec<T> {
    text.lines()
        .skip(1)
        .filter_map(|line| parse(&line.split(',').collect::<Vec<_>>()))
        .collect()
}

fn number(column: &str) -> Option<u32> {
    match column.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None if column.is_empty() => Some(0),
        None => column.parse().ok(),
    }
}

fn quad(columns: &[&str]) -> Option<Quad> {
    let mut quad = [0; 4];
    for (register, column) in quad.iter_mut().zip(columns) {
        *register = number(column)?;
    }
    Some(quad)
}

fn cpuid_row(columns: &[&str]) -> Option<CpuidRow> {
    Some(CpuidRow {
        leaf: number(columns.get(1)?)?,
        subleaf: number(columns.get(2)?)?,
        faulting: number(columns.get(4)?)? != 0,
        fixed0: quad(columns.get(5..9)?)?,
        fixed1: quad(columns.get(9..13)?)?,
        config_direct: quad(columns.get(13..17)?)?,
        allow_direct: quad(columns.get(17..21)?)?,
        configurable: !columns.get(21)?.is_empty(),
    })
}

fn xfam_row(columns: &[&str]) -> Option<XfamRow> {
    Some(XfamRow {
        leaf: number(columns.first()?)?,
        subleaf: number(columns.get(1)?)?,
        xfam_bit: number(columns.get(2)?)?,
        mask: quad(columns.get(3..7)?)?,
    })
}

fn msr_row(columns: &[&str]) -> Option<MsrRow> {
    let [_index, _name, first, last, read, on_read, write, on_write] = *columns else {
        return None;
    };
    Some(MsrRow {
        first: number(first)?,
        last: number(last)?,
        read: (exits(read)?, action(on_read)?),
        write: (exits(write)?, action(on_write)?),
    })
}

fn exits(column: &str) -> Option<Exits> {
    Some(match column {
        "FIXED_0" => Exits::Never,
        "FIXED_1" => Exits::Always,
        "DYN_PERFMON" => Exits::Without(Feature::Perfmon),
        "DYN_PKS" => Exits::Without(Feature::Pks),
        "DYN_TSX" => Exits::Without(Feature::Tsx),
        "DYN_UMWAIT" => Exits::Without(Feature::Waitpkg),
        "DYN_XFAM_CET" => Exits::Without(Feature::Cet),
        "DYN_XFAM_LBR" => Exits::Without(Feature::Lbr),
        "DYN_XFAM_PT" => Exits::Without(Feature::Pt),
        "DYN_XFAM_ULI" => Exits::Without(Feature::Uintr),
        "DYN_XFD" => Exits::Without(Feature::Xfd),
        "DYN_OTHER" => Exits::Without(Feature::OfAddress),
        _ => return None,
    })
}

fn action(column: &str) -> Option<Action> {
    Some(match column {
        "VE" => Action::Ve,
        "GP" => Action::Gp,
        "GP_OR_VE" => Action::GpOrVe,
        "OTHER" => Action::Other,
        "FATAL_ERROR" => Action::Unexpected,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_files_is_a_row() {
        let lines = |text: &str| text.lines().count() - 1;
        assert_eq!(CPUID.len(), lines(include_str!("tables/cpuid.csv")));
        assert_eq!(XFAM.len(), lines(include_str!("tables/cpuid_xfam.csv")));
        assert_eq!(MSRS.len(), lines(include_str!("tables/msrs.csv")));
    }

    #[test]
    fn no_row_hides_another() {
        for (i, r) in CPUID.iter().enumerate() {
            assert_eq!(cpuid_index(r.leaf, r.subleaf), Some(i));
        }
        assert!(MSRS.windows(2).all(|w| w[0].last < w[1].first));
        assert!(MSRS.iter().all(|r| r.first <= r.last));
    }

    #[test]
    fn an_access_that_never_exits_has_no_action() {
        for r in MSRS.iter() {
            for (exits, action) in [r.read, r.write] {
                assert_eq!(
                    exits == Exits::Never,
                    action == Action::Unexpected,
                    "{:#x}",
                    r.first
                );
            }
        }
    }
}
