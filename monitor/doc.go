// Package monitor is the small HTTP server of a daemon: /healthz and /readyz, which answer 200 or 503 by what the
// daemon has registered, and /metrics. It owns nothing in the kernel or in etcd: the daemon registers checks and a
// Gatherer, which know what there is to say.
//
// There are two listeners. The one on a loopback address serves all three to the processes of the node, the kubelet
// among them: a pod on the network of its node is probed with `host: 127.0.0.1`. The other one, which is off by
// default, serves /metrics and what was registered with Share to whoever shows a certificate of the given CA.
//
// Pages about single pods, which the daemon registers with Page or Trace, are served to fewer: to root, by a unix
// socket (ServeRoot), and at the second listener to clients whose certificates are named.
//
// Invariants:
//   - A request changes nothing, but PUT of /log-level on the loopback address; there is no other method than GET and
//     HEAD besides. Only the pages of Page, Trace and Share have parameters.
//   - What comes to the loopback address with another source than a loopback one is closed unread: with
//     route_localnet=1, which kube-proxy sets, the kernel takes 127.0.0.1 from the network.
//   - A client that keeps many connections open does not block others: where there are too many, the client that has
//     most loses its oldest. A client is an IPv4 address or an IPv6 /64. One that takes longer than 2 s for the
//     handshake and for its header is cut.
//   - Metrics are gathered once a second at most, however many requests there are.
//   - A check that hangs or panics is an answer, 503, and is not asked again before it has returned.
//   - A panic of whatever answers is logged, closes the connection, and ends nothing else.
//   - A port that is taken stops no daemon: it is logged, and tried again.
package monitor
