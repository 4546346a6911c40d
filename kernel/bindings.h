/* SPDX-License-Identifier: GPL-2.0-only */
/* What bindgen reads: the interfaces of vDPA and vhost, which the kernel crate has no bindings for. */
#include <linux/vdpa.h>
#include <linux/irqbypass.h>
#include <linux/vhost_iotlb.h>
#include <linux/iommu.h>
#include <linux/eventfd.h>
#include <linux/cdev.h>
#include <linux/kthread.h>
#include <uapi/linux/vhost.h>
#include "vhost.h"
#include "src/shim.h"
