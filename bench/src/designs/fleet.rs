//! The technologies of a fleet's VMs, and the order of visits.

use serde::{Deserialize, Serialize};

/// The number of VMs in a fleet. An index is a `u8`, so no form needs a bounds check.
pub const VMS: usize = 256;

/// The number of operations in one run.
pub const OPS: usize = 1 << 16;

/// A composition of the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fleet {
    /// Every VM is of the first technology (VMX).
    Same,
    /// Every VM is of the last technology (SEV), which shows the cost of the last arm.
    SameLast,
    /// VMX and TDX at random: one Intel host.
    Mix2,
    /// SVM and SEV at random: one AMD host, in a program built for all four.
    Mix2Amd,
    /// All four at random. No real host holds both vendors' VMs; software platforms may.
    Mix4,
    /// The same four, visited technology by technology.
    Mix4Grouped,
}

impl Fleet {
    /// Every composition.
    pub const ALL: [Self; 6] = [
        Self::Same,
        Self::SameLast,
        Self::Mix2,
        Self::Mix2Amd,
        Self::Mix4,
        Self::Mix4Grouped,
    ];

    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::SameLast => "same_last",
            Self::Mix2 => "mix2",
            Self::Mix2Amd => "mix2_amd",
            Self::Mix4 => "mix4",
            Self::Mix4Grouped => "mix4_grouped",
        }
    }

    /// The number of technologies that a form must support to hold this fleet.
    pub const fn needs(self) -> usize {
        match self {
            Self::Same => 1,
            Self::Mix2 => 2,
            _ => 4,
        }
    }

    /// The technology (0 VMX, 1 TDX, 2 SVM, 3 SEV) of each VM.
    pub fn techs(self) -> [u8; VMS] {
        let mut random = Random(0x5eed);
        core::array::from_fn(|_| {
            let r = random.next();
            match self {
                Self::Same => 0,
                Self::SameLast => 3,
                Self::Mix2 => r & 1,
                Self::Mix2Amd => 2 + (r & 1),
                Self::Mix4 | Self::Mix4Grouped => r & 3,
            }
        })
    }

    /// The VMs in the order of one run; each `round` has another order.
    pub fn order(self, round: u64) -> Vec<u8> {
        let mut random = Random(round.wrapping_add(0x0dd5));
        let mut order: Vec<u8> = (0..OPS).map(|_| random.next()).collect();
        if self == Self::Mix4Grouped {
            let techs = self.techs();
            for pass in order.chunks_mut(VMS) {
                pass.sort_by_key(|&vm| techs[usize::from(vm)]);
            }
        }
        order
    }
}

/// splitmix64: small, and reproducible everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u8 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 56) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_holds_the_technologies_that_it_names() {
        for (fleet, want) in [
            (Fleet::Same, vec![0]),
            (Fleet::SameLast, vec![3]),
            (Fleet::Mix2, vec![0, 1]),
            (Fleet::Mix2Amd, vec![2, 3]),
            (Fleet::Mix4, vec![0, 1, 2, 3]),
        ] {
            let mut techs = fleet.techs().to_vec();
            techs.sort_unstable();
            let share = VMS / want.len();
            for tech in &want {
                let n = techs.iter().filter(|t| *t == tech).count();
                assert!(n.abs_diff(share) < 40, "{fleet:?}: {n} VMs of {tech}");
            }
            techs.dedup();
            assert_eq!(techs, want);
        }
    }

    #[test]
    fn grouped_means_at_most_four_runs_in_a_pass() {
        let techs = Fleet::Mix4Grouped.techs();
        for pass in Fleet::Mix4Grouped.order(1).chunks(VMS) {
            let mut seen: Vec<u8> = pass.iter().map(|&vm| techs[usize::from(vm)]).collect();
            seen.dedup();
            assert!(seen.len() <= 4);
        }
    }
}
