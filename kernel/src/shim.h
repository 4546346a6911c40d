/* SPDX-License-Identifier: GPL-2.0-only */
/* Inline functions and macros of the kernel that Rust cannot reach otherwise, one line each. */
#ifndef VDPA_LIVE_SHIM_H
#define VDPA_LIVE_SHIM_H

struct vm_area_struct;
struct vm_fault;

extern int max_iotlb_entries;
extern bool verify_remap;
extern bool strict_new_owner;
extern char *parents;

u64 vvl_page_to_pfn(struct page *page);
struct page *vvl_pfn_to_page(u64 pfn);
u64 vvl_memlock_pages(void);
u64 vvl_vma_flags(const struct vm_area_struct *vma);
struct mm_struct *vvl_current_mm(void);
s64 vvl_pinned_vm(struct mm_struct *mm);
void vvl_pinned_vm_add(struct mm_struct *mm, s64 pages);
u64 vvl_nospec(u64 index, u64 size);
void vvl_spin_lock_init(spinlock_t *lock);
unsigned long vvl_spin_lock_irqsave(spinlock_t *lock);
void vvl_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags);
void vvl_map_doorbell(struct vm_area_struct *vma, const struct vm_operations_struct *ops);
const char *vvl_driver_name(struct device *dev);
struct iommu_domain *vvl_domain_alloc(struct device *dev);
bool vvl_dma_coherent(struct device *dev);
u64 vvl_aperture(struct iommu_domain *domain, bool last);
int vvl_iommu_map(struct iommu_domain *domain, u64 iova, u64 pa, size_t size, int prot);
struct cdev *vvl_cdev(struct inode *inode);
int vvl_minor_alloc(unsigned int limit);
void vvl_minor_free(int minor);
void vvl_down_write(struct rw_semaphore *lock);
void vvl_up_write(struct rw_semaphore *lock);
#endif
