//! What a host's migration TD or agent demands of the one at the other host.

use kvm_ops_attest::snp::Tcb;
use kvm_ops_migtd::agent::{AgentPolicy, LeastTcb};
use kvm_ops_migtd::{ExchangeError, Failure as GaveUp, Measurements, Mismatch, Policy, Svn};

use super::Kinds;
use crate::bytes::{Bytes, parse_exact, parse_number};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};

/// The policy of the migration TD or agent. It is measured with it, so hosts whose policies differ have other migration TDs and
/// agents: by default they refuse each other.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "The migration TD or agent at the other host")]
pub(super) struct Peer {
    /// MRTD that the peer of a migration TD must have, in place of its own
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    peer_mrtd: Option<Bytes<48>>,

    /// Its RTMRs, from RTMR0 on, with --peer-mrtd; zeros for those that are not given
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>, requires = "peer_mrtd")]
    peer_rtmr: Vec<Bytes<48>>,

    /// Bits that its ATTRIBUTES must have: a number, in hex with 0x. None by default
    #[arg(long, value_name = "BITS", value_parser = parse_number)]
    peer_attributes: Option<u64>,

    /// Bits that they must not have. By default 0xff, those of a TD under debug
    #[arg(long, value_name = "BITS", value_parser = parse_number)]
    peer_attributes_forbidden: Option<u64>,

    /// The least security versions of its TDX module (TEE_TCB_SVN), each of 16 compared on its own. By default those of this
    /// host's
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<16>)]
    peer_svn: Option<Bytes<16>>,

    /// Launch digest that the peer of a migration agent must have, in place of its own
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    peer_measurement: Option<Bytes<48>>,

    /// Bits that its guest policy must not have, beside DEBUG. By default 0x40000, MIGRATE_MA
    #[arg(long, value_name = "BITS", value_parser = parse_number)]
    peer_policy_forbidden: Option<u64>,

    /// The least TCB of its host, by parts: fmc (Turin only), boot-loader, tee, snp, microcode. By default that of this host
    #[arg(long, value_name = "PARTS", value_parser = Tcb::parse)]
    peer_tcb: Option<Tcb>,
}

impl Peer {
    /// The options that are given, with the technology that each is for.
    fn given(&self) -> impl Iterator<Item = (&'static str, bool)> {
        let options = [
            ("--peer-mrtd", self.peer_mrtd.is_some(), true),
            ("--peer-attributes", self.peer_attributes.is_some(), true),
            (
                "--peer-attributes-forbidden",
                self.peer_attributes_forbidden.is_some(),
                true,
            ),
            ("--peer-svn", self.peer_svn.is_some(), true),
            ("--peer-measurement", self.peer_measurement.is_some(), false),
            (
                "--peer-policy-forbidden",
                self.peer_policy_forbidden.is_some(),
                false,
            ),
            ("--peer-tcb", self.peer_tcb.is_some(), false),
        ];
        let given = options.into_iter().filter(|(_, given, _)| *given);
        given.map(|(option, _, of_td)| (option, of_td))
    }

    /// Refuses options that fit no migration TD or agent of this guest.
    pub(super) fn fits(&self, tech: Kinds, within: bool) -> Outcome<()> {
        for (option, of_td) in self.given() {
            let why = match (tech, of_td) {
                _ if within => "a move within a host has no peer",
                (Kinds::Sev | Kinds::SevEs, _) => {
                    "the firmware of SEV and SEV-ES guests judges its peer itself"
                }
                (Kinds::SevSnp, true) => "it is for the migration TD of a TD (--tech tdx)",
                (Kinds::Tdx, false) => {
                    "it is for the migration agent of an SNP guest (--tech sev-snp)"
                }
                (Kinds::SevSnp, false) | (Kinds::Tdx, true) => continue,
            };
            let what = format!("{option} does not fit this guest");
            return Err(Failure::new(what).hint(why).code(Code::Usage));
        }
        if self.peer_rtmr.len() > 4 {
            let what = format!("--peer-rtmr is given {} times", self.peer_rtmr.len());
            let failure = Failure::new(what).hint("a TD has four RTMRs");
            return Err(failure.code(Code::Usage));
        }
        Ok(())
    }

    /// The policy of a migration TD.
    pub(super) fn of_td(&self) -> Policy {
        let default = Policy::default();
        let measurements = self.peer_mrtd.map(|Bytes(mrtd)| {
            let mut rtmr = [[0; 48]; 4];
            for (register, Bytes(value)) in rtmr.iter_mut().zip(&self.peer_rtmr) {
                *register = *value;
            }
            Measurements { mrtd, rtmr }
        });
        Policy {
            measurements,
            attributes_required: self.peer_attributes.unwrap_or(default.attributes_required),
            attributes_forbidden: self
                .peer_attributes_forbidden
                .unwrap_or(default.attributes_forbidden),
            svn: self
                .peer_svn
                .map_or(default.svn, |Bytes(least)| Svn::AtLeast(least)),
        }
    }

    /// The policy of a migration agent.
    pub(super) fn of_agent(&self) -> AgentPolicy {
        let default = AgentPolicy::default();
        AgentPolicy {
            measurement: self.peer_measurement.map(|Bytes(digest)| digest),
            policy_forbidden: self
                .peer_policy_forbidden
                .unwrap_or(default.policy_forbidden),
            tcb: self.peer_tcb.map_or(default.tcb, LeastTcb::AtLeast),
        }
    }

    /// The failure of an exchange, with the rule by which a peer was refused.
    pub(super) fn refused(&self, what: &str, error: ExchangeError) -> Failure {
        let what = match self.rule(&error) {
            Some(rule) => format!("{what}, by {rule}"),
            None => what.to_owned(),
        };
        Failure::because(what, error).hint("the guest runs on at its source")
    }

    /// The rule, as it was given or is by default.
    fn rule(&self, error: &ExchangeError) -> Option<String> {
        let ExchangeError::Failed(GaveUp::Policy(mismatch)) = error else {
            return None;
        };
        let own = "the rule to be like this host's own";
        let hex = |option: &str, value: Option<String>| match value {
            Some(value) => format!("{option} {value}"),
            None => format!("{own} in the absence of {option}"),
        };
        let (td, agent) = (self.of_td(), self.of_agent());
        Some(match mismatch {
            Mismatch::Mrtd => hex(
                "--peer-mrtd",
                self.peer_mrtd.map(|Bytes(mrtd)| hex::encode(mrtd)),
            ),
            Mismatch::Rtmr(n) => {
                let value = td.measurements.map(|it| it.rtmr[usize::from(*n & 3)]);
                hex("--peer-rtmr", value.map(hex::encode))
            }
            Mismatch::Forbidden => {
                format!("--peer-attributes-forbidden {:#x}", td.attributes_forbidden)
            }
            Mismatch::Required => format!("--peer-attributes {:#x}", td.attributes_required),
            Mismatch::Svn(_) => hex(
                "--peer-svn",
                self.peer_svn.map(|Bytes(svn)| hex::encode(svn)),
            ),
            Mismatch::Measurement => hex("--peer-measurement", agent.measurement.map(hex::encode)),
            Mismatch::GuestPolicy => {
                format!("--peer-policy-forbidden {:#x}", agent.policy_forbidden)
            }
            Mismatch::Tcb => hex("--peer-tcb", self.peer_tcb.map(|tcb| tcb.to_string())),
            _ => return None,
        })
    }
}
