//! The peers that a migration agent carries contexts to, and takes them from.

use kvm_ops_attest::snp::Tcb;

/// The least TCB that the peer's report may have, part by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeastTcb {
    /// That of the platform below this agent.
    Own,
    /// This one.
    AtLeast(Tcb),
}

/// The rules by which a migration agent judges its peer. It is measured with the agent, so that whoever trusts the measurement
/// trusts the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentPolicy {
    /// The launch digest; `None` for a peer like this agent.
    pub measurement: Option<[u8; 48]>,
    /// Bits that the policy of the peer must not have. A peer that its host may debug is refused whatever this says.
    pub policy_forbidden: u64,
    /// The TCB.
    pub tcb: LeastTcb,
}

/// MIGRATE_MA: another agent could carry the peer away, with the keys that it has.
const MIGRATE_MA: u64 = 1 << 18;

impl Default for AgentPolicy {
    /// The same agent on a platform that is no older, which stays there.
    fn default() -> Self {
        Self {
            measurement: None,
            policy_forbidden: MIGRATE_MA,
            tcb: LeastTcb::Own,
        }
    }
}

impl AgentPolicy {
    /// The rules as bytes, for the measurement.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match &self.measurement {
            None => out.push(0),
            Some(measurement) => {
                out.push(1);
                out.extend_from_slice(measurement);
            }
        }
        out.extend_from_slice(&self.policy_forbidden.to_le_bytes());
        match &self.tcb {
            LeastTcb::Own => out.push(0),
            LeastTcb::AtLeast(tcb) => {
                out.push(1);
                let Tcb {
                    fmc,
                    boot_loader,
                    tee,
                    snp,
                    microcode,
                } = *tcb;
                out.extend_from_slice(&[fmc, boot_loader, tee, snp, microcode]);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_that_differ_are_measured_differently() {
        let own = AgentPolicy::default();
        let all = [
            own,
            AgentPolicy {
                measurement: Some([0; 48]),
                ..own
            },
            AgentPolicy {
                policy_forbidden: 0,
                ..own
            },
            AgentPolicy {
                tcb: LeastTcb::AtLeast(Tcb::default()),
                ..own
            },
        ];
        let mut encoded = all.map(|policy| policy.encode()).to_vec();
        encoded.sort_unstable();
        encoded.dedup();
        assert_eq!(encoded.len(), all.len());
    }
}
