// Clusters: their barrier, and shared memory of other blocks.
#include "simt/machine.h"
#include "simt/weak_memory.h"

namespace simt {

unsigned cluster_rank() { return current->block->rank; }

unsigned cluster_size() { return static_cast<unsigned>(current->block->cluster->blocks.size()); }

void finish_cluster_barrier_if_complete(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live) return;
  ++statistics().barriers;
  note_progress();
  cluster.arrived = 0;
  ++cluster.phase;
  // Of the next phase: nobody has released anything in it yet.
  cluster.released[cluster.phase & 1].clear();
  for (Thread* waiting : cluster.waiting) make_ready(waiting);
  cluster.waiting.clear();
}

void cluster_arrive(const char* file, int line) {
  note_position("cluster_arrive", file, line);
  Thread& thread = *current;
  Cluster& cluster = *thread.block->cluster;
  if (thread.arrived_at_cluster) fail("cluster_arrive twice without cluster_wait", file, line);
  thread.arrived_at_cluster = true;
  thread.cluster_phase = cluster.phase;
  race::release(thread, cluster.released[cluster.phase & 1]);
  weak::publish(thread);
  ++cluster.arrived;
  finish_cluster_barrier_if_complete(cluster);
  maybe_switch(file, line);
}

void cluster_wait(const char* file, int line) {
  note_position("cluster_wait", file, line);
  Thread& thread = *current;
  Cluster& cluster = *thread.block->cluster;
  if (!thread.arrived_at_cluster) fail("cluster_wait without cluster_arrive", file, line);
  if (cluster.phase == thread.cluster_phase) {
    cluster.waiting.push_back(&thread);
    wait_here("cluster_wait", file, line);
  }
  thread.arrived_at_cluster = false;
  race::acquire(thread, cluster.released[thread.cluster_phase & 1]);
}

void* map_rank(const void* own, unsigned rank, const char* file, int line) {
  note_position("map_rank", file, line);
  Block& block = *current->block;
  Cluster& cluster = *block.cluster;
  if (block_of(own) != &block) fail("map_rank of a pointer that is not into this block's shared memory", file, line);
  if (rank >= cluster.blocks.size()) fail("map_rank: the cluster has no block of this rank", file, line);
  Block& target = *cluster.blocks[rank];
  if (target.live == 0) fail("map_rank: the other block has ended", file, line);
  if (&target != &block) target.mapped_in_phase = cluster.phase + 1;
  return target.shared + (static_cast<const char*>(own) - block.shared);
}

}  // namespace simt
