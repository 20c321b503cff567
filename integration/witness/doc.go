// Package witness watches a lab from outside over a whole run, and reports what must never happen: two nodes that
// answer for one IP (the LAN), a packet of a selected pod with another source than its egress IP (the outside host), an
// owner that was followed by another without having let go (etcd's history).
//
// It uses packets and the owners' records alone, and asks no part of Egret. Judging may be repeated at will; what was
// wrong once stays wrong.
package witness
