// Package lab builds a whole cluster on one machine: for the demo, the integration tests and the benchmarks, and for
// people through the command egret-lab.
//
// Every part is real: an etcd for Egret and one for the Kubernetes API (so that either can fail alone), a
// kube-apiserver, crdsync, one agent per node. Nodes, pods, the control plane and a host outside the cluster are
// network namespaces on one LAN bridge:
//
//	lan        br0, a port to-<x> per host on the LAN
//	outside    10.10.0.200, with 203.0.113.10 behind it; echo servers on TCP and UDP port 7; knows no pod route
//	control    10.10.0.250: etcd on port 2379, the API server on port 6443, crdsync
//	node-N     10.10.0.(100+N), cni0 10.244.N.1/24, routes to the other nodes' pods, a masquerade rule (table inet cni), as a simple
//	           CNI leaves them; the agent
//	pods       10.244.N.2 and up, each with a namespace of its own
//
// The same holds for IPv6 (fd10::/64, 2001:db8::10, fd44:N::/64) where the kernel has it. rp_filter is 1 everywhere, so
// that what works here works in the strict case.
//
// An agent runs with the capabilities of the manifests' container, no way to get others, a read-only /proc/sys and a
// mount of /proc/sys/net in the lab's folder. Its etcd is without TLS: agents and crdsync have --insecure.
//
// A lab owns the folder /run/egret-lab/<name> (state, process ids, logs, data), the namespaces egret-<name>-* in
// /run/netns, and the processes whose id and start time it recorded; nothing in the machine's own namespace but two
// listening ports on 127.0.0.1, which its process `serve` relays to the API server and to etcd. It outlives the process
// that made it, until Down.
//
// Invariants: only a process that the lab started is ever signalled. Whatever interrupts Up, Down removes what it left.
// Commands on one lab exclude each other where they change it, also between processes. No external tool is needed but
// kubectl, for Kubectl.
//
// What it does not do: no kubelet and no controller runs. The lab sets a pod's status as a kubelet would, pods are
// deleted with grace 0, and a deleted namespace stays terminating.
//
// With Config.Kubelet it does: a controller manager, a scheduler and a DNS server for Services run on the control host,
// and in each node's namespaces (network, mount, PID, UTS, IPC) an init that starts containerd, a kubelet and
// kube-proxy, and starts them again when they end. Pods are what the kubelets start; Egret is left to who installs it
// with kubectl. What a node writes is in memory and ends with the node; the cgroups egret-lab-<name> of every hierarchy
// (version 1) are the lab's, too, until Down. With Config.CNI such nodes have flannel instead of the lab's own routes
// and masquerading.
package lab
