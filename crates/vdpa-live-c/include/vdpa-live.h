#ifndef VDPA_LIVE_H
#define VDPA_LIVE_H

/**
 * libvdpa-live: drive a vhost-vdpa device, and be replaced without closing it.
 *
 * Results. A function that returns int returns 0 or a number that its comment names, and on failure a negative number of errno.h,
 * for which vdpa_live_error() has the text: what was wrong, and what would be right. Numbers that a comment does not name are those
 * of requests to the device and of system calls. Everywhere: -EINVAL for NULL where something is needed and for what makes no
 * sense; -EBADF for a descriptor that is not open; -ENODEV for a session whose device is not in this program any more, and -EBUSY
 * while it is stopped for an update; -ENOTRECOVERABLE for a bug of the library, after which the object can only be freed.
 *
 * Objects. What a function gives through a pointer to a pointer is the caller's, to be freed by the function that its comment names,
 * once, when no other call uses it; it is NULL after a failure. Strings are UTF-8. What is given to a function is only read during
 * the call, unless its comment says more. Descriptors that are given are copied, so that the caller closes its own at any time;
 * those that are returned belong to the object and are closed with it, but for vdpa_live_incoming_descriptor().
 *
 * Threads. Every function may be called in any thread; calls on one object wait for each other. No function blocks longer than the
 * device or the time limits of its plan. Nothing may be called in a signal handler or between fork(2) and execve(2).
 *
 * Feature words are masks, as 1ull << VIRTIO_F_VERSION_1, not numbers of bits.
 */


#include <stddef.h>
#include <stdint.h>

/**
 * Poll the descriptor of vdpa_live_incoming_fd() and call vdpa_live_incoming_step() again.
 */
#define VDPA_LIVE_WAIT 0

/**
 * The update is there: sections, descriptors and memory can be read, and vdpa_live_take_over() can be called.
 */
#define VDPA_LIVE_OFFERED 1

/**
 * The devices are this program's.
 */
#define VDPA_LIVE_TAKEN 2

/**
 * A device is lost, or the library has a bug.
 */
#define VDPA_LIVE_LOG_ERROR 3

/**
 * An update was rolled back.
 */
#define VDPA_LIVE_LOG_WARNING 4

/**
 * A device was opened, an update has succeeded.
 */
#define VDPA_LIVE_LOG_INFO 6

/**
 * The device may read.
 */
#define VDPA_LIVE_READ 1

/**
 * The device may write.
 */
#define VDPA_LIVE_WRITE 2

/**
 * The best strategy that the device offers.
 */
#define VDPA_LIVE_BEST 0

/**
 * The device never stops.
 */
#define VDPA_LIVE_LIVE 1

/**
 * The device is suspended and resumed.
 */
#define VDPA_LIVE_RESUME 2

/**
 * The device is suspended, reset and set up again; mappings stay.
 */
#define VDPA_LIVE_RESET 3

/**
 * The device is closed and opened again, and everything is pinned again. Works on every device.
 */
#define VDPA_LIVE_REOPEN 4

/**
 * The device does not serve the queue until vdpa_live_enable_queue().
 */
#define VDPA_LIVE_QUEUE_DISABLED 1

/**
 * The device begins at base and not at the beginning of a fresh ring.
 */
#define VDPA_LIVE_QUEUE_AT_BASE 2

/**
 * An update that comes to this program.
 */
struct vdpa_live_incoming;

/**
 * Memory of this process that any number of devices use, wholly or in parts. An update carries it over once.
 */
struct vdpa_live_memory;

/**
 * What an update carries over: sessions, state and descriptors of the caller. It can be used for any number of attempts.
 */
struct vdpa_live_plan;

/**
 * Devices that are stopped, and their state as bytes and named descriptors, for a caller that brings it to a successor itself.
 */
struct vdpa_live_saved;

/**
 * A device that this process drives. Calls on one session wait for each other.
 */
struct vdpa_live_session;

/**
 * An update by a child or by hand-over: first a successor gets ready while the devices are driven, then they are switched over.
 */
struct vdpa_live_update;

/**
 * A descriptor by its name.
 */
struct vdpa_live_descriptor {
  /**
   * The name that vdpa_live_saved_descriptor() gave it.
   */
  const char *name;
  /**
   * The descriptor.
   */
  int fd;
};

/**
 * A section that a program knows, and the versions of it that it can read.
 */
struct vdpa_live_known {
  /**
   * Name of the section.
   */
  const char *name;
  /**
   * Oldest version.
   */
  uint32_t oldest;
  /**
   * Newest version.
   */
  uint32_t newest;
};

/**
 * A function that gets the messages. level is one of VDPA_LIVE_LOG_ERROR, VDPA_LIVE_LOG_WARNING and VDPA_LIVE_LOG_INFO, which are
 * those of syslog(3). text has no newline and is valid during the call. It is called in the thread in which the library was
 * called, by several threads at a time if several call the library. It cannot call vdpa_live_set_log(); what
 * other calls in it would log is left out.
 */
typedef void (*vdpa_live_log)(void *opaque, int level, const char *text);

/**
 * What vdpa_live_memory_info() tells. Pointers and the descriptor belong to the memory and are valid as long as it.
 */
struct vdpa_live_memory_info {
  /**
   * Name of the memory.
   */
  const char *name;
  /**
   * Address in this process; NULL in a successor that has not taken over yet.
   */
  void *address;
  /**
   * Bytes.
   */
  uint64_t size;
  /**
   * The object; -1 for memory without one.
   */
  int fd;
  /**
   * First byte of the memory in the object.
   */
  uint64_t offset;
};

/**
 * A mapping for the device: a part of a memory at I/O virtual addresses.
 */
struct vdpa_live_region {
  /**
   * Name of the region, unique in the session. The successor finds it by this name.
   */
  const char *name;
  /**
   * The memory. The region keeps it, so it may be freed once it is mapped.
   */
  struct vdpa_live_memory *memory;
  /**
   * First byte in the memory; a multiple of 4096.
   */
  uint64_t offset;
  /**
   * First I/O virtual address; a multiple of 4096.
   */
  uint64_t iova;
  /**
   * Bytes; a multiple of 4096.
   */
  uint64_t size;
  /**
   * VDPA_LIVE_READ, VDPA_LIVE_WRITE or both.
   */
  uint32_t perm;
};

/**
 * A virtqueue: a ring, split or packed as negotiated, in memory that is mapped for the device, and its events. The library does
 * not access the ring.
 */
struct vdpa_live_queue {
  /**
   * Number of the queue.
   */
  uint32_t index;
  /**
   * Entries; for a split ring a power of two.
   */
  uint32_t size;
  /**
   * I/O virtual address of the descriptor area.
   */
  uint64_t desc;
  /**
   * I/O virtual address of the driver area (available ring).
   */
  uint64_t driver;
  /**
   * I/O virtual address of the device area (used ring).
   */
  uint64_t device;
  /**
   * The eventfd that the device waits for.
   */
  int kick;
  /**
   * The eventfd that the device signals.
   */
  int call;
  /**
   * Where the device begins with VDPA_LIVE_QUEUE_AT_BASE, as VHOST_GET_VRING_BASE has given it.
   */
  uint32_t base;
  /**
   * 0, or VDPA_LIVE_QUEUE_DISABLED, VDPA_LIVE_QUEUE_AT_BASE or both.
   */
  uint32_t flags;
};

/**
 * What a device offers, and what is in use.
 */
struct vdpa_live_device_info {
  /**
   * Virtio device id: 1 network, 2 block.
   */
  uint32_t device_id;
  /**
   * Number of virtqueues.
   */
  uint32_t queues;
  /**
   * Entries of the largest ring.
   */
  uint32_t queue_size_max;
  /**
   * Device features that it offers.
   */
  uint64_t offered_features;
  /**
   * Device features in use; 0 before negotiation.
   */
  uint64_t features;
  /**
   * Backend features (VHOST_BACKEND_F_) that it offers.
   */
  uint64_t offered_backend_features;
  /**
   * Backend features in use; 0 before negotiation.
   */
  uint64_t backend_features;
  /**
   * First I/O virtual address that it can use.
   */
  uint64_t iova_first;
  /**
   * Last I/O virtual address that it can use.
   */
  uint64_t iova_last;
};

/**
 * What somebody else has set up on a device.
 */
struct vdpa_live_present {
  /**
   * Device features that were negotiated.
   */
  uint64_t features;
  /**
   * Backend features that were acknowledged.
   */
  uint64_t backend_features;
  /**
   * Mappings that the device has.
   */
  const struct vdpa_live_region *regions;
  /**
   * Number of regions.
   */
  size_t region_count;
  /**
   * Rings that the device has, with the events that it has for them. base and VDPA_LIVE_QUEUE_AT_BASE are ignored.
   */
  const struct vdpa_live_queue *queues;
  /**
   * Number of queues.
   */
  size_t queue_count;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The text of the last error in this thread, in English, without a newline: what was wrong and what would be right. An empty
 * string before the first one. It is valid until the next call of this library in this thread that fails.
 */
const char *vdpa_live_error(void);

/**
 * The version of the library that runs, as "0.1.0".
 */
const char *vdpa_live_version(void);

/**
 * Finds the update by which this program was started, by exec or as a child: returns 1 and sets *incoming, or 0 on a first start.
 * Call it once, early, before other threads exist, since it adopts inherited descriptors. For a child it blocks until the
 * predecessor has sent its offer. After an exec that fails here the devices are closed.
 *
 * The update is at VDPA_LIVE_OFFERED. Free it with vdpa_live_incoming_free().
 */
int vdpa_live_inherit(struct vdpa_live_incoming **incoming);

/**
 * Waits at a Unix stream socket for a predecessor that calls vdpa_live_hand_over(), which must be root or the user of this process.
 * The library copies the descriptor. Go on with vdpa_live_incoming_step(). timeout_ms 0 is no limit.
 */
int vdpa_live_receive(int socket,
                      uint32_t timeout_ms,
                      struct vdpa_live_incoming **incoming);

/**
 * Reads the state of vdpa_live_save(), which the caller has brought here: size bytes, and count descriptors by their names. The
 * library copies both. Checks that the state is consistent and fits the devices, by requests that change nothing. The update is at
 * VDPA_LIVE_OFFERED. -EBADMSG: it is damaged, or a descriptor is missing.
 */
int vdpa_live_load(const void *data,
                   size_t size,
                   const struct vdpa_live_descriptor *descriptors,
                   size_t count,
                   struct vdpa_live_incoming **incoming);

/**
 * The descriptor to poll for reading at VDPA_LIVE_WAIT. It belongs to incoming, and is another one after
 * vdpa_live_take_over().
 */
int vdpa_live_incoming_fd(const struct vdpa_live_incoming *incoming);

/**
 * Goes on as far as is possible without waiting: returns VDPA_LIVE_WAIT, VDPA_LIVE_OFFERED or VDPA_LIVE_TAKEN. After an error the
 * update is over, and the predecessor keeps the devices. -ETIMEDOUT: the time is over. -ECONNRESET: the predecessor is gone.
 * -ECANCELED: it has called the update off.
 */
int vdpa_live_incoming_step(const struct vdpa_live_incoming *incoming);

/**
 * Finds a section of the predecessor: sets *data and *size, and *version if it is not NULL. The data is valid until incoming is
 * freed. -ENOENT: there is none of that name.
 */
int vdpa_live_incoming_section(const struct vdpa_live_incoming *incoming,
                               const char *name,
                               uint32_t *version,
                               const void **data,
                               size_t *size);

/**
 * Checks that this program knows every section that is not optional, and refuses the update otherwise: the predecessor keeps its
 * devices and is told which one. -EBADMSG then.
 */
int vdpa_live_incoming_understands(const struct vdpa_live_incoming *incoming,
                                   const struct vdpa_live_known *known,
                                   size_t count);

/**
 * Takes a descriptor that the predecessor has passed by vdpa_live_plan_descriptor(): it is the caller's to close, and
 * close-on-exec. -ENOENT: there is none of that name, or it was taken before.
 */
int vdpa_live_incoming_descriptor(const struct vdpa_live_incoming *incoming,
                                  const char *name);

/**
 * Sets *memory to memory number at of the devices, from 0 on, for vdpa_live_memory_info() and vdpa_live_memory_bring(). Free it
 * with vdpa_live_memory_free(). -ERANGE: there are not so many.
 */
int vdpa_live_incoming_memory(const struct vdpa_live_incoming *incoming,
                              size_t at,
                              struct vdpa_live_memory **memory);

/**
 * Takes the devices over. After an exec or vdpa_live_load() that is done at once: returns VDPA_LIVE_TAKEN. Otherwise tells the
 * predecessor that this program is ready, and returns VDPA_LIVE_WAIT until the predecessor has switched: poll and step. After an
 * error the predecessor keeps or gets the devices; after an exec they are closed.
 */
int vdpa_live_take_over(const struct vdpa_live_incoming *incoming);

/**
 * Gives a device that was taken over to the caller, as a session to be closed with vdpa_live_close(). Those that are left are
 * closed with incoming. -ENODEV: there is none of that name, or it was given before.
 */
int vdpa_live_incoming_session(const struct vdpa_live_incoming *incoming,
                               const char *name,
                               struct vdpa_live_session **session);

/**
 * The times of an update that is taken over, as text of several lines; NULL before. Valid until incoming is freed.
 */
const char *vdpa_live_incoming_report(const struct vdpa_live_incoming *incoming);

/**
 * Refuses an update that is not taken over: the predecessor is told reason, which may be NULL, and keeps its devices.
 */
int vdpa_live_incoming_refuse(const struct vdpa_live_incoming *incoming,
                              const char *reason);

/**
 * Frees an update. One that is not taken over is refused; devices that were taken over and not given to the caller are closed.
 * NULL does nothing.
 */
void vdpa_live_incoming_free(struct vdpa_live_incoming *incoming);

/**
 * Has log called with opaque for each message; NULL ends that. When it returns, the function given before is not called any
 * more. It need not be called: without it, nothing is written anywhere.
 *
 * Returns 0, or -EBUSY when log itself calls it.
 */
int vdpa_live_set_log(vdpa_live_log log,
                      void *opaque);

/**
 * Makes memory: size bytes of the object fd (a memfd, a hugetlb memfd, a file) from byte offset on. The library copies the
 * descriptor.
 *
 * With address NULL the library maps it, shared. Otherwise it is mapped there by the caller, shared and for reading and writing,
 * and stays mapped until the memory is freed and no region has it; that it is this object is checked when an update begins. With
 * fd -1 the memory has no object: it ends with this program, so sessions that use it cannot be updated.
 *
 * Free it with vdpa_live_memory_free().
 */
int vdpa_live_memory_new(const char *name,
                         int fd,
                         uint64_t offset,
                         uint64_t size,
                         void *address,
                         struct vdpa_live_memory **memory);

/**
 * Frees memory. It stays where it is as long as a region has it. NULL does nothing.
 */
void vdpa_live_memory_free(struct vdpa_live_memory *memory);

/**
 * Tells where memory is.
 */
int vdpa_live_memory_info(const struct vdpa_live_memory *memory, struct vdpa_live_memory_info *info);

/**
 * Brings the mapping of a successor that maps memory itself: memory is of vdpa_live_incoming_memory(), before the devices are
 * taken over, and the object and offset of vdpa_live_memory_info() are mapped at address, shared, in full size. It stays mapped
 * as in vdpa_live_memory_new(). Without this call the library maps the memory.
 */
int vdpa_live_memory_bring(const struct vdpa_live_memory *memory,
                           void *address);

/**
 * Maps count regions for the device, in one batch if the device can. All or nothing.
 *
 * Fails with -EEXIST for a name that is there, -ERANGE outside of what the device can address, -ENOMEM when RLIMIT_MEMLOCK is too
 * low, or the error of the device.
 */
int vdpa_live_map(const struct vdpa_live_session *session,
                  const struct vdpa_live_region *regions,
                  size_t count);

/**
 * Unmaps a region. The caller makes sure that no ring lies in it and no request in flight uses it. Blocks until the device does
 * not access it any more. -ENOENT: there is none of that name.
 */
int vdpa_live_unmap(const struct vdpa_live_session *session,
                    const char *name);

/**
 * Says that a region is mapped at another address of this process from now on: memory is another mapping of the same object, from
 * the same offset of it, in the same size. The device may run; it accesses the same pages as before. Both mappings must exist
 * during the call.
 */
int vdpa_live_remap(const struct vdpa_live_session *session,
                    const char *name,
                    const struct vdpa_live_memory *memory);

/**
 * Maps a part of a memory without a name, for mappings that a guest's virtual IOMMU makes, many in a second: one request, and an
 * update that is being prepared stays valid if the memory was in use when it began.
 */
int vdpa_live_map_at(const struct vdpa_live_session *session,
                     const struct vdpa_live_memory *memory,
                     uint64_t offset,
                     uint64_t iova,
                     uint64_t size,
                     uint32_t perm);

/**
 * Unmaps what vdpa_live_map_at() has mapped at exactly this range. As vdpa_live_unmap() otherwise.
 */
int vdpa_live_unmap_at(const struct vdpa_live_session *session, uint64_t iova, uint64_t size);

/**
 * Finds a region by its name, as a successor does. Sets *region, with the caller's pointer as the name and with a memory of its
 * own: free that with vdpa_live_memory_free(). -ENOENT: there is none of that name.
 */
int vdpa_live_find_region(const struct vdpa_live_session *session,
                          const char *name,
                          struct vdpa_live_region *region);

/**
 * Makes an empty plan. Free it with vdpa_live_plan_free().
 */
int vdpa_live_plan_new(struct vdpa_live_plan **plan);

/**
 * Frees a plan; its sessions stay. NULL does nothing.
 */
void vdpa_live_plan_free(struct vdpa_live_plan *plan);

/**
 * Adds a session under a name, by which the successor finds it. strategy is VDPA_LIVE_BEST or another of its group; whether the
 * device can do it is found when the update begins. The session stays the caller's, and is closed after the plan is freed.
 * -EEXIST: the name or the session is there.
 */
int vdpa_live_plan_session(const struct vdpa_live_plan *plan,
                           const char *name,
                           const struct vdpa_live_session *session,
                           uint32_t strategy);

/**
 * Sets state of the caller that is known now: a section, size bytes with the version of their layout. The library copies them. A
 * section of that name is replaced, as for a further attempt. A successor that does not know a section with optional 0 refuses.
 */
int vdpa_live_plan_section(const struct vdpa_live_plan *plan,
                           const char *name,
                           uint32_t version,
                           int optional,
                           const void *data,
                           size_t size);

/**
 * Announces a section that will be given by vdpa_live_update_section(), so that a successor that does not know it refuses before
 * a device stops.
 */
int vdpa_live_plan_late_section(const struct vdpa_live_plan *plan,
                                const char *name,
                                uint32_t version,
                                int optional);

/**
 * Passes an open file to the successor, under a name. The library copies the descriptor. -EEXIST: the name is there.
 */
int vdpa_live_plan_descriptor(const struct vdpa_live_plan *plan,
                              const char *name,
                              int fd);

/**
 * Limits the update, in ms: how long a successor may take until it is ready (30000), how long the switch may take (30000), and how
 * long an aborted successor may take to release the devices until it is killed (2000). 0 is no limit for the first two.
 */
int vdpa_live_plan_limits(const struct vdpa_live_plan *plan,
                          uint32_t prepare_ms,
                          uint32_t switch_ms,
                          uint32_t grace_ms);

/**
 * Sets up a queue, before vdpa_live_start(). The library copies the descriptors.
 *
 * -EBUSY: the device runs already. -EEXIST: the queue is set up. -EINVAL: the ring is not in memory that is mapped, or its size is
 * not possible.
 */
int vdpa_live_add_queue(const struct vdpa_live_session *session,
                        const struct vdpa_live_queue *queue);

/**
 * Tells the ring and the events of a queue, as a successor needs them. The descriptors belong to the session. base is 0; see
 * vdpa_live_vring_base(). -ENOENT: it is not set up.
 */
int vdpa_live_find_queue(const struct vdpa_live_session *session,
                         uint32_t index,
                         struct vdpa_live_queue *queue);

/**
 * Makes the device serve a queue, or not with enabled 0. An update keeps it.
 */
int vdpa_live_enable_queue(const struct vdpa_live_session *session, uint32_t queue, int enabled);

/**
 * Stops the devices of a plan as their strategies say (with VDPA_LIVE_LIVE they run, and nobody may drive them), and saves their
 * state. One of vdpa_live_roll_back() and vdpa_live_release() ends it; then free *saved with vdpa_live_saved_free(). On failure
 * the devices run as before.
 */
int vdpa_live_save(const struct vdpa_live_plan *plan,
                   struct vdpa_live_saved **saved);

/**
 * Sets *data and *size to the state. It belongs to saved. A successor gives it to vdpa_live_load().
 */
int vdpa_live_saved_bytes(const struct vdpa_live_saved *saved, const void **data, size_t *size);

/**
 * The number of descriptors.
 */
int vdpa_live_saved_descriptor_count(const struct vdpa_live_saved *saved);

/**
 * Returns descriptor number at, from 0 on, and sets *name to its name; name may be NULL. Both belong to saved. The descriptor is
 * close-on-exec. -ERANGE: there are not so many.
 */
int vdpa_live_saved_descriptor(const struct vdpa_live_saved *saved,
                               size_t at,
                               const char **name);

/**
 * Starts the devices again in this program: the sessions have them back. reason is told to the servers of the devices; it may be
 * NULL. acted is 0 when no successor has called vdpa_live_take_over(), else 1; no other process may have a descriptor of a device
 * any more, or two would drive it. -ENODEV: a device could not be started again; its session says so.
 */
int vdpa_live_roll_back(const struct vdpa_live_saved *saved,
                        const char *reason,
                        int acted);

/**
 * Leaves the devices to the successor: closes every descriptor of them here. The sessions are empty then.
 */
int vdpa_live_release(const struct vdpa_live_saved *saved);

/**
 * Frees what was saved, with its descriptors. Devices that were neither rolled back nor released are released. NULL does nothing.
 */
void vdpa_live_saved_free(struct vdpa_live_saved *saved);

/**
 * Tells what the device that is open as fd offers. Changes nothing; its owner may be another process.
 */
int vdpa_live_offered(int fd, struct vdpa_live_device_info *info);

/**
 * Opens a device file, becomes the owner and negotiates features: those of required, or -EOPNOTSUPP; those of wanted that the
 * device offers; and always VIRTIO_F_VERSION_1 and VIRTIO_F_ACCESS_PLATFORM. The device is reset. Then map memory, add queues and
 * call vdpa_live_start().
 *
 * Close it with vdpa_live_close(). -EBUSY: another process, or this one, has the device.
 */
int vdpa_live_open(const char *path,
                   uint64_t required,
                   uint64_t wanted,
                   struct vdpa_live_session **session);

/**
 * As vdpa_live_open(), for a device that is open as fd. The library copies the descriptor; close the own one, since the device is
 * in use until all of them are closed. path may be NULL; then strategy VDPA_LIVE_REOPEN is not possible.
 */
int vdpa_live_from_fd(int fd,
                      const char *path,
                      uint64_t required,
                      uint64_t wanted,
                      struct vdpa_live_session **session);

/**
 * Makes a session of a device that this program has set up by other means, which runs or does not: for programs that keep their
 * code and want updates. Makes only requests that change nothing. fd and path as for vdpa_live_from_fd().
 */
int vdpa_live_assume(int fd,
                     const char *path,
                     const struct vdpa_live_present *present,
                     struct vdpa_live_session **session);

/**
 * Closes the device, which resets it and unmaps everything, and frees the session. After an update by which another process has
 * got the device it frees the session only. NULL does nothing.
 */
void vdpa_live_close(struct vdpa_live_session *session);

/**
 * Tells what the device offers and what is in use.
 */
int vdpa_live_session_info(const struct vdpa_live_session *session, struct vdpa_live_device_info *info);

/**
 * The descriptor of the device, for requests that this library does not have. It belongs to the session. What such requests
 * change is not carried over by an update.
 */
int vdpa_live_session_fd(const struct vdpa_live_session *session);

/**
 * Starts the device (DRIVER_OK).
 */
int vdpa_live_start(const struct vdpa_live_session *session);

/**
 * Stops the device: when it returns, no request is in flight in it, and the vring bases stay. Blocks until requests in flight have
 * ended. -EOPNOTSUPP where the device does not offer it.
 */
int vdpa_live_suspend(const struct vdpa_live_session *session);

/**
 * Starts a suspended device again where it has stopped. -EOPNOTSUPP where the device does not offer it.
 */
int vdpa_live_resume(const struct vdpa_live_session *session);

/**
 * Resets the device, as a guest does, and negotiates again: of wanted those features that the device offers. All queues are
 * removed, memory stays mapped, requests in flight are lost. Blocks while the device resets.
 */
int vdpa_live_reset(const struct vdpa_live_session *session,
                    uint64_t wanted);

/**
 * The status register of the device, 0 to 255.
 */
int vdpa_live_status(const struct vdpa_live_session *session);

/**
 * Sets *base to where the device goes on in a ring, as VHOST_GET_VRING_BASE gives it; exact while the device is suspended.
 */
int vdpa_live_vring_base(const struct vdpa_live_session *session,
                         uint32_t queue,
                         uint32_t *base);

/**
 * Reads size bytes of the configuration space from offset on. -ERANGE beyond its end.
 */
int vdpa_live_read_config(const struct vdpa_live_session *session, uint32_t offset, void *data, size_t size);

/**
 * Writes size bytes to the configuration space from offset on.
 */
int vdpa_live_write_config(const struct vdpa_live_session *session,
                           uint32_t offset,
                           const void *data,
                           size_t size);

/**
 * Has the device signal the eventfd when its configuration changes or it needs a reset; -1 ends that. The library copies the
 * descriptor. Call it again after an update.
 */
int vdpa_live_set_config_event(const struct vdpa_live_session *session,
                               int eventfd);

/**
 * Replaces this program by the file path, by exec: the process stays, and the new image finds the devices by
 * vdpa_live_inherit(). argv and envp end with NULL, as for execve(2); NULL stands for those of this program. All other threads
 * end, as by execve(2). Nobody may drive the devices from the call on.
 *
 * Returns only on failure, with the devices running in this program as before: -ENOENT or -EACCES for the file, -EOPNOTSUPP for
 * a strategy that a device cannot do, -EINVAL for memory that would end with this program, or the error of a device.
 */
int vdpa_live_exec(const struct vdpa_live_plan *plan,
                   const char *path,
                   const char *const *argv,
                   const char *const *envp);

/**
 * Begins an update by a child: starts the file path, which finds the devices by vdpa_live_inherit(). argv and envp as for
 * vdpa_live_exec(). Go on with vdpa_live_update_step(), drive the devices meanwhile; their regions, queues and features stay as
 * they are. Free *update with vdpa_live_update_free().
 */
int vdpa_live_fork(const struct vdpa_live_plan *plan,
                   const char *path,
                   const char *const *argv,
                   const char *const *envp,
                   struct vdpa_live_update **update);

/**
 * Begins an update by hand-over to the process at the other end of a Unix stream socket, which calls vdpa_live_receive(). The
 * library copies the descriptor. Go on as after vdpa_live_fork().
 */
int vdpa_live_hand_over(const struct vdpa_live_plan *plan,
                        int socket,
                        struct vdpa_live_update **update);

/**
 * The descriptor to poll for reading, until vdpa_live_update_step() has returned 1. It belongs to the update.
 */
int vdpa_live_update_fd(const struct vdpa_live_update *update);

/**
 * Process id of the successor: of a child at once, of another process once it is ready. A child is the caller's to wait for, by
 * waitpid(2), once the update has succeeded.
 */
int vdpa_live_update_successor(const struct vdpa_live_update *update);

/**
 * Goes on as far as is possible without waiting. Returns 1 once the successor is ready, 0 when there is more to wait for. After an
 * error the update is over; the devices have not been touched. -ETIMEDOUT: it was not ready in time. -ECHILD: it has ended.
 * -ECANCELED: it refused.
 */
int vdpa_live_update_step(const struct vdpa_live_update *update);

/**
 * Sets the contents of a section that vdpa_live_plan_late_section() has announced. The library copies them.
 */
int vdpa_live_update_section(const struct vdpa_live_update *update,
                             const char *name,
                             uint32_t version,
                             int optional,
                             const void *data,
                             size_t size);

/**
 * Switches the devices over to the successor, which is ready. Nobody may drive them from the call on. Blocks for the limit of the
 * switch at most, on failure also for the grace period.
 *
 * Returns 0 when the successor has the devices; the sessions are empty then, and are closed as others. On failure the sessions
 * have their devices back, which run as before.
 */
int vdpa_live_update_switch(const struct vdpa_live_update *update);

/**
 * Frees an update. One that is not over is aborted: the successor is told, a child is killed after the grace period, and the
 * devices stay here. NULL does nothing.
 */
void vdpa_live_update_free(struct vdpa_live_update *update);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif /* VDPA_LIVE_H */
