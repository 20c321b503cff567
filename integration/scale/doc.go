// Package scale measures Egret in a cluster of thousands of nodes: etcd, an API server, crdsync and the agent of node-1
// are real, in a lab of their own; all other agents are clients of etcd in one process, the fleet. `egret-lab bench
// scale` runs it, docs/scale.md has what it measured.
//
// An agent of the fleet has a connection to etcd of its own, a lease that it renews as agents do (store.Lease.Run), a
// record, and a watch of each range that the View of its node has (store.ViewRanges). It keeps nothing of what it is
// told, and programs no kernel. The gateways of the fleet hold locks, ask etcd for a yes (store.Lease.Confirm), and
// gossip; the others do not gossip. The objects of Kubernetes are written into the API server's etcd, as it would write
// them: it serves them, but was not asked to create them.
//
// The package owns nothing but the lab that it makes and removes.
package scale
