// SPDX-License-Identifier: GPL-2.0-only
/* Module parameters, and the functions of shim.h. */
#include <linux/module.h>
#include <linux/mm.h>
#include <linux/iommu.h>
#include <linux/nospec.h>
#include <linux/rwsem.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/spinlock.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include "shim.h"

int max_iotlb_entries = 2048;
module_param(max_iotlb_entries, int, 0444);
MODULE_PARM_DESC(max_iotlb_entries, "Maximum number of iotlb entries. (default: 2048)");

bool verify_remap;
module_param(verify_remap, bool, 0644);
MODULE_PARM_DESC(verify_remap, "Refuse a VHOST_IOTLB_REMAP to other memory: compares file and offset of each area. (default: N)");

bool strict_new_owner;
module_param(strict_new_owner, bool, 0644);
MODULE_PARM_DESC(strict_new_owner, "Refuse VHOST_NEW_OWNER while the device runs and is not suspended. (default: N)");

char *parents = "vdpasim_net+remap,vdpasim_blk+remap,vduse,mlx5_vdpa.vnet";
module_param(parents, charp, 0444);
MODULE_PARM_DESC(parents, "Parents for which VHOST_NEW_OWNER is offered though they do not say so, by driver or management device; NAME+remap: and VHOST_IOTLB_REMAP");

static DEFINE_IDA(minors);

u64 vvl_page_to_pfn(struct page *page) { return page_to_pfn(page); }
struct page *vvl_pfn_to_page(u64 pfn) { return pfn_to_page(pfn); }
u64 vvl_vma_flags(const struct vm_area_struct *vma) { return vma->vm_flags; }
u64 vvl_memlock_pages(void) { return PFN_DOWN(rlimit(RLIMIT_MEMLOCK)); }
struct mm_struct *vvl_current_mm(void) { return current->mm; }
s64 vvl_pinned_vm(struct mm_struct *mm) { return atomic64_read(&mm->pinned_vm); }
void vvl_pinned_vm_add(struct mm_struct *mm, s64 pages) { atomic64_add(pages, &mm->pinned_vm); }
u64 vvl_nospec(u64 index, u64 size) { return array_index_nospec(index, size); }
void vvl_spin_lock_init(spinlock_t *lock) { spin_lock_init(lock); }
void vvl_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags) { spin_unlock_irqrestore(lock, flags); }
const char *vvl_driver_name(struct device *dev) { return dev->driver ? dev->driver->name : NULL; }
struct iommu_domain *vvl_domain_alloc(struct device *dev) { return iommu_paging_domain_alloc(dev); }
bool vvl_dma_coherent(struct device *dev) { return device_iommu_capable(dev, IOMMU_CAP_CACHE_COHERENCY); }
int vvl_iommu_map(struct iommu_domain *domain, u64 iova, u64 pa, size_t size, int prot) { return iommu_map(domain, iova, pa, size, prot, GFP_KERNEL_ACCOUNT); }
struct cdev *vvl_cdev(struct inode *inode) { return inode->i_cdev; }
int vvl_minor_alloc(unsigned int limit) { return ida_alloc_max(&minors, limit - 1, GFP_KERNEL); }
void vvl_minor_free(int minor) { ida_free(&minors, minor); }
void vvl_down_write(struct rw_semaphore *lock) { down_write(lock); }
void vvl_up_write(struct rw_semaphore *lock) { up_write(lock); }

unsigned long vvl_spin_lock_irqsave(spinlock_t *lock)
{
	unsigned long flags;

	spin_lock_irqsave(lock, flags);
	return flags;
}

void vvl_map_doorbell(struct vm_area_struct *vma, const struct vm_operations_struct *ops)
{
	vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
	vm_flags_set(vma, VM_IO | VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP);
	vma->vm_ops = ops;
}

/* The range that a domain confines addresses to, or everything. */
u64 vvl_aperture(struct iommu_domain *domain, bool last)
{
	if (!domain || !domain->geometry.force_aperture)
		return last ? U64_MAX : 0;
	return last ? domain->geometry.aperture_end : domain->geometry.aperture_start;
}
