// Package gateway is what the measurements share: it makes egresses in a lab, waits until pods leave with their IP,
// finds the node that owns it, and injects a fault there. It owns a client of the lab's etcd, and nothing in the kernel
// but what the lab does for it.
package gateway
