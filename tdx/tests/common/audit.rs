//! Invariants of a machine after any history, seen from the module's own tables.

use std::collections::BTreeSet;

use kvm_ops_core::{FreeReport, Leaked, Pfn, PrivateSpte};
use kvm_ops_tdx::TdxVm;
use soft_tdx_module::{HkidState, PageSize, PageType, SeptState};

use super::TestHost;

/// The pages that a report leaks.
pub fn leaked_pages(report: &FreeReport) -> BTreeSet<Pfn> {
    let pages = report.leaks.iter().filter_map(|leak| match leak.what {
        Leaked::Page(hpa) => Some(Pfn::containing(hpa)),
        _ => None,
    });
    pages.collect()
}

/// After the only VM of a machine is gone: every page and every KeyID is free or reported.
pub fn all_accounted(host: &TestHost, report: &FreeReport) {
    let leaked = leaked_pages(report);
    assert_eq!(
        leaked.len(),
        report
            .leaks
            .iter()
            .filter(|leak| matches!(leak.what, Leaked::Page(_)))
            .count(),
        "no page is listed twice: {report:?}"
    );
    assert_eq!(
        report.pages_freed + leaked.len() as u64,
        host.takings(),
        "freed and leaked pages are all pages ever taken"
    );
    let taken: BTreeSet<Pfn> = host.taken().into_iter().collect();
    assert_eq!(taken, leaked, "what did not come back is what is reported");
    for page in host.ever_taken() {
        let view = host
            .platform()
            .page(page.get() << 12, PageSize::Size4K)
            .expect("in the TDMR");
        assert!(
            view.page_type == PageType::Nda || leaked.contains(&page),
            "the module has {page:?} as {:?} and the report omits it",
            view.page_type
        );
    }
    let keys: BTreeSet<u32> = report
        .leaks
        .iter()
        .filter_map(|leak| match leak.what {
            Leaked::Key(key) => Some(key),
            _ => None,
        })
        .collect();
    let config = host.platform().config();
    for hkid in config.private_hkids.0..=config.private_hkids.1 {
        let state = host.platform().hkid(hkid).expect("a private key id").state;
        assert!(
            matches!(state, HkidState::Free | HkidState::Reserved) || keys.contains(&hkid.into()),
            "the module has KeyID {hkid} and the report omits it"
        );
    }
    let pool = host.key_pool();
    assert_eq!(
        (pool.in_use(), pool.leaked()),
        (keys.len() as u32, keys.len() as u32),
        "a KeyID is free or leaked"
    );
    assert_eq!(host.live() - taken.len() as u64 - keys.len() as u64, 0);
}

/// The pages of a live TD as the module counts them are those that the back end knows.
pub fn mirror_equals_secure_ept(host: &TestHost, vm: &TdxVm<TestHost>) {
    let Some(tdr) = vm.tdr() else { return };
    let platform = host.platform();
    let mut tables = 0u64;
    let mut pages = 0u64;
    vm.for_each_private(|gfn, level, spte| {
        let gpa = gfn.get() << 12;
        let Some(view) = platform.sept(tdr.get(), gpa, level as u8) else {
            panic!("{gfn:?} has an entry before TDH.MNG.INIT");
        };
        assert_eq!(view.level, level as u8, "{gfn:?} {spte:?}: {view:?}");
        let expected: &[SeptState] = match spte {
            PrivateSpte::Absent => &[SeptState::Free],
            PrivateSpte::Table(_) => &[SeptState::NlMapped],
            PrivateSpte::BlockedTable(_) => &[SeptState::NlBlocked],
            PrivateSpte::Mapped(_) => &[SeptState::Mapped, SeptState::Pending],
            PrivateSpte::Blocked(_) => &[SeptState::Blocked, SeptState::PendingBlocked],
        };
        assert!(expected.contains(&view.state), "{gfn:?} {spte:?}: {view:?}");
        match spte {
            PrivateSpte::Mapped(page) | PrivateSpte::Blocked(page) => {
                pages += level.frames();
                let hpa = view.entry & 0x000f_ffff_ffff_f000;
                assert_eq!(hpa >> 12, page.get(), "{gfn:?}");
            }
            PrivateSpte::Table(_) | PrivateSpte::BlockedTable(_) => tables += 1,
            PrivateSpte::Absent => {}
        }
    });
    // Nothing more than that: the module's own count of the TD's pages.
    let mut control = 0;
    for page in host.ever_taken() {
        let view = platform.page(page.get() << 12, PageSize::Size4K).unwrap();
        let of_td = view.owner == tdr.get();
        control += u64::from(of_td && matches!(view.page_type, PageType::Tdcx | PageType::Tdvpr));
    }
    let td = platform.td(tdr.get()).expect("the TD");
    assert_eq!(
        td.chldcnt,
        control + tables + pages,
        "{}",
        platform.dump_sept(tdr.get())
    );
    let stats = vm.private_stats();
    assert_eq!(
        (stats.pages_4k + stats.pages_2m * 512, stats.tables),
        (pages, tables)
    );
}
