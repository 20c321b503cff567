package agent

import (
	"github.com/egret-project/egret/monitor"
)

// Bounds of durations in seconds: a planned move takes hundredths, a take-over half a second and a permit, and etcd a
// thousandth where all is well.
var (
	takeBuckets   = []float64{.02, .05, .1, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 10, 20, 40}
	shortBuckets  = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}
	marginBuckets = []float64{0, .025, .05, .1, .15, .2, .25, .3, .4, .5, 1, 10}
)

// What an agent tells of itself, of the egress IPs that it serves, and of those that its pods use. No metric has a
// label for a pod.
var (
	metricOwned = monitor.Metric{Name: "egret_egress_owned", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "1 for each egress IP whose lock this node has and uses."}
	metricTakeover = monitor.Metric{Name: "egret_takeover_duration_seconds", Type: monitor.Histogram, Labels: []string{"cause"}, Buckets: takeBuckets,
		Help: "How long it took until this node used an egress IP, by the cause: claim, nobody had held it; crash, its owner had died; release, its owner " +
			"had given it up; move, drain, rebalance, it was handed over; static, the address is the node's. It counts from when this agent saw that the IP " +
			"had no living owner, or that it was asked to take it; for a death, a third of a second after it."}
	metricReleases = monitor.Metric{Name: "egret_releases_total", Type: monitor.Counter, Labels: []string{"cause"},
		Help: "Egress IPs that this node gave up, by the cause: release, it might not or could not serve it; move, drain, rebalance, it handed it over."}
	metricRevoked = monitor.Metric{Name: "egret_leases_revoked_total", Type: monitor.Counter,
		Help: "Leases that this agent ended since their agents were dead or their nodes gone."}
	metricLost = monitor.Metric{Name: "egret_leases_lost_total", Type: monitor.Counter,
		Help: "How often etcd dropped this agent's own lease: all its egress IPs went then."}
	metricMargin = monitor.Metric{Name: "egret_permit_margin_seconds", Type: monitor.Histogram, Buckets: marginBuckets,
		Help: "What was left of the node's permits when they were renewed. At 0 the node falls silent. Renewals are every quarter of --permit."}
	metricRenewals = monitor.Metric{Name: "egret_permit_renewals_total", Type: monitor.Counter, Labels: []string{"how"},
		Help: "Renewals of permits: frames, without a commit; commit, by a transaction of nftables, which makes others read the ruleset anew; failed."}
	metricQuestion = monitor.Metric{Name: "egret_etcd_question_duration_seconds", Type: monitor.Histogram, Buckets: shortBuckets,
		Help: "How long etcd took to say that the lease of this agent is there. Only with the gossip is it asked."}
	metricNoAnswer = monitor.Metric{Name: "egret_etcd_questions_failed_total", Type: monitor.Counter,
		Help: "Such questions that got no answer within --permit, or another answer."}
	metricWatch = monitor.Metric{Name: "egret_etcd_watch_up", Type: monitor.Gauge,
		Help: "1 while this agent follows the changes in etcd."}
	metricPass = monitor.Metric{Name: "egret_pass_duration_seconds", Type: monitor.Histogram, Buckets: shortBuckets,
		Help: "How long a pass of the agent took: it looks at etcd and the kernel, and makes the kernel as it is to be."}
	metricPassFailed = monitor.Metric{Name: "egret_passes_failed_total", Type: monitor.Counter,
		Help: "Passes that could not do all that was to be done; they are tried again."}
	metricToKernel = monitor.Metric{Name: "egret_change_to_kernel_seconds", Type: monitor.Histogram, Buckets: shortBuckets,
		Help: "From when a change in etcd came to this agent, as that a pod is selected, until the kernel had it; of changes for which the kernel was written to."}
	metricKernel = monitor.Metric{Name: "egret_kernel_changes_total", Type: monitor.Counter, Labels: []string{"part"},
		Help: "Changes that were written to the kernel: addresses, routes, nftables. A steady state writes nothing."}
	metricResets = monitor.Metric{Name: "egret_rp_filter_resets_total", Type: monitor.Counter, Labels: []string{"link"},
		Help: "How often somebody set rp_filter of a link of Egret's, the overlay's or a VLAN's, and it was set back."}
	metricDegraded = monitor.Metric{Name: "egret_degraded", Type: monitor.Gauge, Labels: []string{"part"},
		Help: "1 for each part that the node could not program in the last pass: addresses, conntrack, fast path, nftables, node, permits, pods, routes, uplink, VLAN links; " +
			"other for what is of none."}
	metricConflict = monitor.Metric{Name: "egret_egress_conflict", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "1 for each egress IP that a host outside the cluster uses, as far as this node heard."}
	metricDropping = monitor.Metric{Name: "egret_egress_dropping", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "1 for each egress IP of which this node drops packets since something on it gives them another source or way."}
	metricRefused = monitor.Metric{Name: "egret_pool_refused", Type: monitor.Gauge, Labels: []string{"pool"},
		Help: "1 for each pool whose IPs this node cannot hold, as where another link has the VLAN."}
	metricGossip = monitor.Metric{Name: "egret_gossip_members", Type: monitor.Gauge, Labels: []string{"state"},
		Help: "The other agents that etcd shows, by what the gossip knows of them: alive, dead, left, unknown. Only with the gossip."}
	metricSentPackets = monitor.Metric{Name: "egret_egress_sent_packets_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Packets that left this node, as the gateway, with the egress IP as their source, those of all nodes' pods. Of packets that a network card cuts up, the whole is one."}
	metricSentBytes = monitor.Metric{Name: "egret_egress_sent_bytes_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Bytes of these packets, from the IP header on."}
	metricReceivedPackets = monitor.Metric{Name: "egret_egress_received_packets_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Packets that came to this node for the egress IP, those that it dropped then included."}
	metricReceivedBytes = monitor.Metric{Name: "egret_egress_received_bytes_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Bytes of these packets, from the IP header on."}
	metricOpened = monitor.Metric{Name: "egret_egress_connections_opened_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Connections that this node's pods opened, or tried to, by the egress IP, whatever node is the gateway. It begins anew after an hour without one."}
	metricOpen = monitor.Metric{Name: "egret_egress_connections", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "Connections that this node's pods have open by the egress IP, whatever node is the gateway, as they were counted last: a scrape has them counted anew " +
			"where that was 15 s ago. Those of UDP are open until the kernel forgets them."}
	metricPorts = monitor.Metric{Name: "egret_egress_ports", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "Ports in the block that new connections of this node's pods by the egress IP get theirs of."}
	metricPortsUsed = monitor.Metric{Name: "egret_egress_ports_used", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "How many of these were in use to the busiest destination when that was last counted: every 2 minutes, and as soon as it may be more than three quarters."}
	metricDropped = monitor.Metric{Name: "egret_dropped_packets_total", Type: monitor.Counter, Labels: []string{"reason"},
		Help: "Packets that Egret's tables on this node dropped, by the counter of `nft list counters table inet egret`; docs/troubleshooting.md says what each is for."}
	metricFast = monitor.Metric{Name: "egret_fast_path_packets_total", Type: monitor.Counter, Labels: []string{"step"},
		Help: "What the programs of --fast-path did with packets, since the agent started: forwarded, sent on from another node; wrapped, sent to another node; " +
			"unwrapped, taken out of the overlay and left to the tables; failed, dropped as the kernel could not do one of these."}
)

var (
	metricLogLines = monitor.Metric{Name: "egret_nat_log_lines_total", Type: monitor.Counter,
		Help: "Lines that were written to the log of connections (--nat-log)."}
	metricLogLost = monitor.Metric{Name: "egret_nat_log_lost_total", Type: monitor.Counter, Labels: []string{"reason"},
		Help: "Lines that are missing in the log of connections: socket, the agent did not read the kernel's events in time; queue, lines came faster than " +
			"they were written; write, they could not be written, as on a full disk. The log itself says so as well."}
)

// Metrics returns all that an agent tells, in the order of the documentation.
func Metrics() []monitor.Metric { return append(counted(), read()...) }

// counted are those that the agent counts, read are those that are read when they are asked for.
func counted() []monitor.Metric {
	return []monitor.Metric{metricTakeover, metricReleases, metricRevoked, metricLost, metricMargin, metricRenewals, metricQuestion, metricNoAnswer, metricPass,
		metricPassFailed, metricToKernel, metricKernel, metricResets, metricLogLines, metricLogLost}
}

func read() []monitor.Metric {
	return []monitor.Metric{metricOwned, metricDegraded, metricWatch, metricGossip, metricConflict, metricDropping, metricRefused, metricSentPackets,
		metricSentBytes, metricReceivedPackets, metricReceivedBytes, metricOpened, metricOpen, metricPorts, metricPortsUsed, metricDropped, metricFast}
}
