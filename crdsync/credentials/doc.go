// Package credentials makes the Secrets that an installation needs and nobody should have to make by hand: certificates
// of the etcd that Egret runs and of its clients, the key of the agents' gossip, and certificates by which agents and
// crdsync tell others of themselves (metrics). It replaces certificates when a third of their life is left.
//
// It owns these Secrets of one namespace, and nothing else:
//
//	egret-etcd-ca        the CA, and while it is replaced the next one: whoever reads it makes any of the others
//	egret-etcd-server    the members, among each other and to clients
//	egret-etcd-agent, -crdsync, -cloud, -operator, -root   clients, whom etcd knows by the common name of the certificate
//	egret-gossip         the gossip's key
//	egret-metrics-ca     another CA, of those who read metrics: no certificate of it opens etcd
//	egret-metrics-agent, -crdsync   the servers of metrics; crdsync is a client of agents, too
//	egret-metrics-reader, -operator clients, such as Prometheus, and an operator whom agents may name in --who-clients
//
// Invariants:
//   - Good Secrets are left alone: with all of them good nothing is written.
//   - The gossip's key is made once and never changed. Agents with different keys cannot gossip.
//   - Every certificate is trusted by readers of all Secrets that were written before it: a new CA is trusted for a
//     week before it signs, and the old one until it expires.
//   - A Secret of ours that cannot be read is an error that names it and is left as it is: it may be of a newer
//     version, and what it signed is in use. Deleting it is how a person asks for a new one. A CA whose Secret alone is
//     deleted goes on being trusted, as if it were replaced; with those of what it signed, all begins anew.
package credentials
