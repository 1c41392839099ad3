//! Launching an SNP guest.

use super::super::{Firmware, Outcome};
use super::{GuestIdentity, Launch};
use crate::command::{
    SnpLaunchFinish, SnpLaunchFinishFlags, SnpLaunchStart, SnpLaunchStartFlags, SnpLaunchUpdate,
    SnpLaunchUpdateFlags, SnpPolicy,
};
use crate::crypto::PublicKey;
use crate::machine::entry::{PageSize, PageState, permission};
use crate::machine::region::{PAGE, Page};
use crate::measure::{IdAuth, IdBlock, PageInfo, PageType, VmplPermissions};
use crate::status::Status;
use crate::wire::{put, u64_at};
use std::sync::Arc;

/// Version of the secrets page.
const SECRETS_VERSION: u32 = 2;
/// SEV_FEATURES in a VMSA, and its bit for a TSC that the host cannot change.
const VMSA_SEV_FEATURES: usize = 0x3b0;
const SECURE_TSC: u64 = 1 << 9;

impl Firmware<'_> {
    pub(super) fn snp_launch_start(&mut self, context: u64, buffer: &SnpLaunchStart) -> Outcome {
        let (policy, flags) = (buffer.policy, buffer.flags);
        if flags.reserved() != 0 {
            return Err(Status::INVALID_PARAM);
        }
        self.check_snp_policy(policy)?;
        let migration_agent = if flags.contains(SnpLaunchStartFlags::MA_EN) {
            if !policy.contains(SnpPolicy::MIGRATE_MA) {
                return Err(Status::POLICY_FAILURE);
            }
            let agent = self.address(buffer.ma_gctx_paddr.get());
            if agent == context {
                return Err(Status::INVALID_GUEST);
            }
            Some(self.snp_guest(agent)?.report_id)
        } else {
            None
        };
        let tcb = self.machine.config.tcb;
        let guest = self.snp_guest_mut(context)?;
        guest.policy = policy;
        guest.launch = Launch {
            imi: flags.contains(SnpLaunchStartFlags::IMI_EN),
            migration_agent,
            desired_tsc_khz: buffer.desired_tsc_khz.get(),
            gosvw: buffer.gosvw,
            secure_tsc: false,
            tcb,
        };
        Ok(())
    }

    pub(super) fn check_snp_policy(&self, policy: SnpPolicy) -> Outcome {
        if policy.missing() != 0 || policy.reserved() != 0 {
            return Err(Status::INVALID_PARAM);
        }
        let config = &self.machine.config;
        let options = self.sp.snp.unwrap_or_default();
        let lacks = |bit, present: bool| policy.contains(bit) && !present;
        let refused = policy.abi() > (config.api.0, config.api.1)
            || (config.smt && !policy.contains(SnpPolicy::SMT))
            || (config.features.cxl && !policy.contains(SnpPolicy::CXL_ALLOW))
            || lacks(SnpPolicy::MEM_AES_256_XTS, config.features.aes_256_xts)
            || lacks(SnpPolicy::RAPL_DIS, options.rapl_disabled)
            || lacks(
                SnpPolicy::CIPHERTEXT_HIDING_DRAM,
                options.max_snp_asid.is_some(),
            )
            || lacks(
                SnpPolicy::PAGE_SWAP_DISABLE,
                config.features.page_swap_disable,
            );
        if refused {
            Err(Status::POLICY_FAILURE)
        } else {
            Ok(())
        }
    }

    pub(super) fn snp_launch_update(&mut self, context: u64, buffer: &SnpLaunchUpdate) -> Outcome {
        let flags = buffer.flags;
        let size = flags.page_size();
        let page_type = flags.page_type().ok_or(Status::INVALID_PARAM)?;
        let permissions = VmplPermissions {
            vmpl1: buffer.vmpl1_perms.bits(),
            vmpl2: buffer.vmpl2_perms.bits(),
            vmpl3: buffer.vmpl3_perms.bits(),
        };
        let lower = [permissions.vmpl1, permissions.vmpl2, permissions.vmpl3];
        let imi = flags.contains(SnpLaunchUpdateFlags::IMI_PAGE);
        if flags.reserved() != 0
            || lower.iter().any(|p| *p > permission::ALL)
            || (imi && !self.snp_guest(context)?.launch.imi)
        {
            return Err(Status::INVALID_PARAM);
        }
        let one_page = matches!(
            page_type,
            PageType::Vmsa | PageType::Secrets | PageType::Cpuid
        );
        if one_page && size == PageSize::Size2M {
            return Err(Status::INVALID_PAGE_SIZE);
        }
        let address = self.aligned_page(buffer.page_paddr.get(), size)?;
        self.add_pages(context, address, size, page_type, permissions, imi)
    }

    /// Measures and encrypts the small pages of one RMP entry, and gives it to the guest. The
    /// region stays locked, so that what was measured is what was encrypted.
    fn add_pages(
        &mut self,
        context: u64,
        address: u64,
        size: PageSize,
        page_type: PageType,
        permissions: VmplPermissions,
        imi: bool,
    ) -> Outcome {
        let guest = self.snp_guest(context)?;
        let (asid, key) = (guest.asid.ok_or(Status::INACTIVE)?, Arc::clone(&guest.key));
        let mut digest = guest.digest;
        let place = self.place(address)?;
        let mut region = place.lock_size(size);
        let entry = region.entry(place.index);
        if entry.state != PageState::PreGuest {
            return Err(Status::INVALID_PAGE_STATE);
        }
        if entry.asid != asid {
            return Err(Status::INVALID_PAGE_OWNER);
        }
        if entry.size != size {
            return Err(Status::INVALID_PAGE_SIZE);
        }
        let mut secure_tsc = false;
        for index in 0..size.bytes() as usize / PAGE {
            let at = place.index + index;
            let content = region.page(at);
            let info = PageInfo {
                page_type,
                gpa: entry.gpa + (index * PAGE) as u64,
                imi,
                permissions,
            };
            digest.add_page(&info, &content);
            let content = match page_type {
                PageType::Normal | PageType::Unmeasured => content,
                PageType::Vmsa => {
                    secure_tsc |= u64_at(&content[..], VMSA_SEV_FEATURES) & SECURE_TSC != 0;
                    content
                }
                PageType::Zero => Box::new([0; PAGE]),
                PageType::Secrets => self.secrets_page(context)?,
                PageType::Cpuid => {
                    if let Err(corrected) = self.check_cpuid_page(&content) {
                        // The host reads what the firmware would have accepted and tries again.
                        region.write(at, 0, &corrected[..]);
                        return Err(Status::INVALID_PARAM);
                    }
                    content
                }
            };
            region.write_with(&key, address + (index * PAGE) as u64, at, 0, &content[..]);
        }
        region.update(place.index, |entry| {
            entry.state = PageState::GuestValid;
            entry.vmsa = page_type == PageType::Vmsa;
            let VmplPermissions {
                vmpl1,
                vmpl2,
                vmpl3,
            } = permissions;
            entry.permissions = [permission::ALL, vmpl1, vmpl2, vmpl3];
        });
        drop(region);
        let guest = self.snp_guest_mut(context)?;
        guest.digest = digest;
        guest.launch.secure_tsc |= secure_tsc;
        Ok(())
    }

    /// The page through which the guest learns its message keys.
    fn secrets_page(&self, context: u64) -> Outcome<Box<Page>> {
        let guest = self.snp_guest(context)?;
        let fms = self.machine.config.cpuid_signature();
        let mut page = Box::new([0; PAGE]);
        put(&mut page[..], 0, &SECRETS_VERSION.to_le_bytes());
        put(&mut page[..], 4, &[guest.launch.imi.into()]);
        put(&mut page[..], 8, &fms.to_le_bytes());
        put(&mut page[..], 0x10, &guest.launch.gosvw);
        for (i, key) in guest.vmpck.iter().enumerate() {
            put(&mut page[..], 0x20 + 32 * i, key);
        }
        Ok(page)
    }

    pub(super) fn snp_launch_finish(&mut self, context: u64, buffer: &SnpLaunchFinish) -> Outcome {
        let flags = buffer.flags;
        let block_wanted = flags.contains(SnpLaunchFinishFlags::ID_BLOCK_EN);
        let author_wanted = flags.contains(SnpLaunchFinishFlags::AUTH_KEY_EN);
        if flags.reserved() != 0 || (author_wanted && !block_wanted) {
            return Err(Status::INVALID_PARAM);
        }
        let mut identity = GuestIdentity {
            host_data: buffer.host_data,
            vcek_disabled: flags.contains(SnpLaunchFinishFlags::VCEK_DIS),
            ..GuestIdentity::default()
        };
        if block_wanted {
            let block = IdBlock::from_bytes(&*self.read_array(buffer.id_block_paddr.get())?);
            let auth = IdAuth::from_bytes(self.read_array(buffer.id_auth_paddr.get())?);
            check_id(&block, &auth, author_wanted)?;
            let guest = self.snp_guest(context)?;
            if block.launch_digest != guest.digest.value() {
                return Err(Status::BAD_MEASUREMENT);
            }
            if block.policy != guest.policy.bits() {
                return Err(Status::POLICY_FAILURE);
            }
            identity.block = Some(block);
            identity.id_key_digest = Some(auth.id_key_digest());
            identity.author_key_digest = author_wanted.then(|| auth.author_key_digest());
        }
        self.snp_guest_mut(context)?.identity = identity;
        Ok(())
    }
}

/// Version, keys and signatures of an ID block.
fn check_id(block: &IdBlock, auth: &IdAuth, with_author: bool) -> Outcome {
    if block.version != 1 {
        return Err(Status::BAD_VERSION);
    }
    let known = |algorithm| algorithm == IdAuth::ECDSA_P384_SHA384;
    let (id_algorithm, author_algorithm) = auth.algorithms();
    if !known(id_algorithm) || (with_author && !known(author_algorithm)) {
        return Err(Status::INVALID_PARAM);
    }
    let id_key = PublicKey::from_bytes(auth.id_key()).ok_or(Status::INVALID_KEY)?;
    if !id_key.verify(&block.to_bytes(), auth.block_signature()) {
        return Err(Status::BAD_SIGNATURE);
    }
    if with_author {
        let author = PublicKey::from_bytes(auth.author_key()).ok_or(Status::INVALID_KEY)?;
        if !author.verify(auth.id_key(), auth.key_signature()) {
            return Err(Status::BAD_SIGNATURE);
        }
    }
    Ok(())
}
