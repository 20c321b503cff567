// Package datapath measures the cost of the datapath: throughput, datagrams and connections a second, and the latency
// of requests, of a pod on each of five paths, by turns, in one lab. `egret-lab bench datapath` runs it,
// docs/datapath.md has what it measured. Figures of two runs, or of two machines, are not to be compared; ratios within
// a run are.
//
// The load generators are goroutines of the calling process with sockets in the namespaces, the same for every path.
// The package owns nothing but the lab that it makes and removes, and judges nothing but the source addresses.
package datapath
