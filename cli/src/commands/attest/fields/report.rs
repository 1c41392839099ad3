//! The fields of a report of an SNP guest.

use super::{Field, bits};
use kvm_ops_attest::snp::{Product, Report, SigningKey, Tcb};
use soft_amd_sp::SnpPolicy;

/// The bit of a policy that has one, without the one that all have.
const fn bit(policy: SnpPolicy) -> u64 {
    policy.bits() & !SnpPolicy::ONES
}

/// Bits of the policy (SNP firmware ABI, guest policy).
const POLICY: [(u64, &str); 9] = [
    (bit(SnpPolicy::SMT), "SMT"),
    (bit(SnpPolicy::MIGRATE_MA), "migration agent"),
    (bit(SnpPolicy::DEBUG), "debugging"),
    (bit(SnpPolicy::SINGLE_SOCKET), "one socket only"),
    (bit(SnpPolicy::CXL_ALLOW), "CXL memory"),
    (bit(SnpPolicy::MEM_AES_256_XTS), "needs AES-256-XTS"),
    (bit(SnpPolicy::RAPL_DIS), "needs RAPL off"),
    (
        bit(SnpPolicy::CIPHERTEXT_HIDING_DRAM),
        "needs ciphertext hiding",
    ),
    (bit(SnpPolicy::PAGE_SWAP_DISABLE), "no page swapping"),
];

/// Bits of the platform information.
const PLATFORM: [(u64, &str); 6] = [
    (1, "SMT"),
    (1 << 1, "TSME"),
    (1 << 2, "ECC"),
    (1 << 3, "RAPL off"),
    (1 << 4, "ciphertext hiding"),
    (1 << 5, "aliases checked"),
];

/// A packed TCB in the order of its bytes, and its parts if the layout is known.
fn tcb(product: Option<Product>, packed: [u8; 8]) -> (String, String) {
    let parts = product.and_then(|product| Tcb::from_bytes(product, packed));
    let number = format!("{:#x}", u64::from_le_bytes(packed));
    (number, parts.map(|tcb| tcb.to_string()).unwrap_or_default())
}

fn version((major, minor, build): (u8, u8, u8)) -> String {
    format!("{major}.{minor} build {build}")
}

fn yes(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}

/// Every field in the order of the report.
pub(in super::super) fn of_report(report: &Report, product: Option<Product>) -> Vec<Field> {
    let mut fields = Vec::new();
    let mut add = |name, value: String, meaning: String| {
        fields.push(Field {
            name,
            value,
            meaning,
        });
    };
    let none = String::new;
    let mut allowed = vec![format!(
        "needs ABI {}.{}",
        report.policy >> 8 & 0xff,
        report.policy & 0xff
    )];
    allowed.extend(bits(report.policy, &POLICY));
    let key = match report.signing_key {
        SigningKey::Vcek => "VCEK, the chip's".to_owned(),
        SigningKey::Vlek => "VLEK, the provider's".to_owned(),
        SigningKey::None => "none".to_owned(),
        SigningKey::Other(number) => format!("number {number}"),
    };
    add("version", report.version.to_string(), none());
    add("guest svn", report.guest_svn.to_string(), none());
    add(
        "policy",
        format!("{:#x}", report.policy),
        allowed.join(", "),
    );
    add("family id", hex::encode(report.family_id), none());
    add("image id", hex::encode(report.image_id), none());
    add("vmpl", report.vmpl.to_string(), none());
    let (value, meaning) = tcb(product, report.current_tcb);
    add("current tcb", value, meaning);
    add(
        "platform info",
        format!("{:#x}", report.platform_info),
        bits(report.platform_info, &PLATFORM).join(", "),
    );
    add("author key", yes(report.author_key_enabled), none());
    add("mask chip key", yes(report.mask_chip_key), none());
    add("signing key", key, none());
    add("report data", hex::encode(report.report_data), none());
    add("measurement", hex::encode(report.measurement), none());
    add("host data", hex::encode(report.host_data), none());
    add("id key digest", hex::encode(report.id_key_digest), none());
    add(
        "author key digest",
        hex::encode(report.author_key_digest),
        none(),
    );
    add("report id", hex::encode(report.report_id), none());
    let agent = if report.report_id_ma == [0xff; 32] {
        "no migration agent"
    } else {
        ""
    };
    add(
        "report id ma",
        hex::encode(report.report_id_ma),
        agent.to_owned(),
    );
    let (value, meaning) = tcb(product, report.reported_tcb);
    add("reported tcb", value, meaning);
    if let Some((family, model, stepping)) = report.cpuid_fms {
        let value = format!("family {family:#x}, model {model:#x}, stepping {stepping:#x}");
        add("processor", value, none());
    }
    add("chip id", hex::encode(report.chip_id), none());
    let (value, meaning) = tcb(product, report.committed_tcb);
    add("committed tcb", value, meaning);
    add("current version", version(report.current_version), none());
    add(
        "committed version",
        version(report.committed_version),
        none(),
    );
    let (value, meaning) = tcb(product, report.launch_tcb);
    add("launch tcb", value, meaning);
    if let Some((launch, current)) = report.mitigations {
        add("launch mitigations", format!("{launch:#x}"), none());
        add("current mitigations", format!("{current:#x}"), none());
    }
    fields
}
