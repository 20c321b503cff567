// Package etcdtest gives a test a real etcd server, or a cluster of them, reached through TCP relays that the test can
// cut, freeze and mend. Nothing of it reaches a binary.
//
// The endpoint stays the same for the whole test, over restarts too: the relay owns the port, so no other process can
// take it while etcd is down; etcd itself listens at a socket in a folder of its own. The data is on disk without fsync
// and goes away with the test.
package etcdtest
