//go:build ignore

// The programs of the fast path: see doc.go. Each either does with a packet what the tables would do, all of it, or
// leaves it to them (NEXT) as it was. IPv4, TCP and UDP.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define NEXT (-1)		// TCX_NEXT: the way of the kernel
#define DROP 2		// TCX_DROP
#define AF_INET 2
#define LOOPBACK 1		// the index of lo
#define OVERLAY_PORT 8479
#define OVERLAY_VNI 7
#define ID_BIT 0x80000u	// of a mark that is an id: as the kernel's VXLAN has a group policy id
#define ROOM 50		// outer IPv4, UDP, VXLAN, inner Ethernet
#define UNIT 0xffc0	// of a port: the first of its unit
#define HEARD 1000000000ull // for how long a node may send after a way back to it was found, ns

// MODE_ENCAP is BPF_F_ADJ_ROOM_ENCAP_L2 of the inner Ethernet header, by hand: the macro differs between headers.
#define MODE_ENCAP (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | \
	BPF_F_ADJ_ROOM_ENCAP_L2_ETH | BPF_F_ADJ_ROOM_NO_CSUM_RESET | ((__u64)ETH_HLEN << 56))


struct conf { __u32 self, overlay, uplink, mtu; __u8 mac[6]; __u16 pad; };
struct unit { __u32 ip; __u16 port, pad; };		// port: host order, the first of its unit
struct node { __u32 underlay; __u8 mac[6]; __u16 pad; };
struct peer { __u32 underlay, pad; __u64 heard; };	// heard: CLOCK_BOOTTIME, ns
struct traffic { __u64 sent, sent_bytes, received, received_bytes; };

#define MAP(name, kind, K, V, n, how) \
	struct { \
		__uint(type, kind); __type(key, K); __type(value, V); __uint(max_entries, n); __uint(map_flags, how); \
	} name SEC(".maps")
MAP(confs, BPF_MAP_TYPE_ARRAY, __u32, struct conf, 1, 0);
MAP(paused, BPF_MAP_TYPE_ARRAY, __u32, __u32, 1, 0);					// not 0: all goes to the tables
MAP(units, BPF_MAP_TYPE_HASH, struct unit, struct node, 262144, BPF_F_NO_PREALLOC);	// whose they are
MAP(peers, BPF_MAP_TYPE_HASH, __u64, struct peer, 65536, BPF_F_NO_PREALLOC);		// by the MAC of their overlay link
MAP(permits, BPF_MAP_TYPE_HASH, __u32, __u64, 8192, BPF_F_NO_PREALLOC);		// until when: CLOCK_BOOTTIME, ns
MAP(counts, BPF_MAP_TYPE_PERCPU_HASH, __u32, struct traffic, 8192, BPF_F_NO_PREALLOC);	// by egress IP
MAP(steps, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, 4, 0);
enum step { FORWARDED, WRAPPED, UNWRAPPED, FAILED };

struct flow { __u32 s, d; __u16 sp, dp, len, size; __u8 proto, tos; };	// size: of the largest packet that it becomes

struct outer { struct ethhdr eth; struct iphdr ip; struct udphdr udp; __be32 vx[2]; struct ethhdr in; } __attribute__((packed));

static __always_inline struct conf *conf(void)
{
	__u32 zero = 0;
	struct conf *c = bpf_map_lookup_elem(&confs, &zero);
	__u32 *off = bpf_map_lookup_elem(&paused, &zero);
	return c && off && !*off ? c : 0;
}

static __always_inline void step(enum step i)
{
	__u32 key = i;
	__u64 *n = bpf_map_lookup_elem(&steps, &key);
	if (n)
		++*n;
}

// first and last are the ends of what can be read. By hand, as clang would add to the address of the context, which
// the verifier refuses.
static __always_inline void *first(struct __sk_buff *skb)
{
	void *p;
	asm volatile("%0 = *(u32 *)(%1 + 76)" : "=r"(p) : "r"(skb));
	return p;
}

static __always_inline void *last(struct __sk_buff *skb)
{
	void *p;
	asm volatile("%0 = *(u32 *)(%1 + 80)" : "=r"(p) : "r"(skb));
	return p;
}

// plain tells whether a packet came in for this host, on this link and no VLAN on it.
static __always_inline int plain(struct __sk_buff *skb)
{
	return skb->pkt_type == PACKET_HOST && !skb->vlan_present && skb->protocol == bpf_htons(ETH_P_IP);
}

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

static __always_inline __u32 sum(struct iphdr *ip)
{
	__u16 *w = (void *)ip;
	__u32 s = 0;
	for (int i = 0; i < 10; i++)
		s += w[i];
	return s;
}

// parse reads the headers of a whole packet of TCP or UDP at off. 0: it is one, with an IP header without options
// that is right, and hops to go. What follows a packet on the wire to make a frame long enough is let pass where pad
// is not 0.
static __always_inline int parse(struct __sk_buff *skb, int off, int pad, struct flow *f)
{
	void *end = last(skb);
	struct iphdr *ip = first(skb) + off;
	__u16 *port = (void *)(ip + 1);
	if ((void *)(port + 4) > end || *(__u8 *)ip != 0x45 || (ip->frag_off & bpf_htons(0xbfff)) || ip->ttl < 2 ||
		fold(sum(ip)) != 0xffff)
		return -1;
	f->s = ip->saddr, f->d = ip->daddr, f->proto = ip->protocol, f->tos = ip->tos, f->len = bpf_ntohs(ip->tot_len);
	f->sp = bpf_ntohs(port[0]), f->dp = bpf_ntohs(port[1]);
	__u32 there = skb->len - off, header = sizeof(*ip) + sizeof(struct udphdr);
	if (f->len < header || there < f->len || (there > f->len && (!pad || skb->gso_size)))
		return -1;
	if (f->proto == 6) {
		__u8 *tcp = (void *)port;
		if ((void *)(tcp + 20) > end || f->len < 40 || tcp[12] < 0x50 || tcp[13] & 2)
			return -1; // the tables clamp the MSS of a SYN
		header = sizeof(*ip) + (tcp[12] >> 4) * 4;
	} else if (f->proto != 17) {
		return -1;
	}
	f->size = f->len;
	if (skb->gso_size) {
		if (skb->gso_size + header > 0xffff)
			return -1;
		f->size = skb->gso_size + header;
	}
	return 0;
}

// nobodys tells whether an address is one that no packet comes from, and that none is forwarded to: the kernel's routes
// have a way there all the same.
static __always_inline int nobodys(__u32 ip)
{
	__u8 top = bpf_ntohl(ip) >> 24;
	return top == 0 || top == 127 || top >= 224;
}

// route looks up where a packet goes: 0, with the next hop in to, where it leaves by the uplink, fits and the next
// hop is known.
static __always_inline int route(struct __sk_buff *skb, struct conf *c, struct flow *f, __u32 link, __u32 flags,
	struct bpf_redir_neigh *to)
{
	struct bpf_fib_lookup q = { .family = AF_INET, .l4_protocol = f->proto, .sport = bpf_htons(f->sp), .dport = bpf_htons(f->dp),
		.tot_len = f->size, .ifindex = link, .tos = f->tos, .ipv4_src = f->s, .ipv4_dst = f->d };
	if (bpf_fib_lookup(skb, &q, sizeof(q), flags) != BPF_FIB_LKUP_RET_SUCCESS || q.family != AF_INET || q.ifindex != c->uplink)
		return -1;
	to->nh_family = AF_INET, to->ipv4_nh = q.ipv4_dst;
	return 0;
}

// comes tells whether the way to an address, which a packet comes from, is the link that it came in by: what
// rp_filter=1 asks for.
static __always_inline int comes(struct __sk_buff *skb, struct conf *c, struct flow *f)
{
	struct bpf_fib_lookup q = { .family = AF_INET, .ifindex = c->uplink, .ipv4_src = f->d, .ipv4_dst = f->s };
	return !nobodys(f->s) && bpf_fib_lookup(skb, &q, sizeof(q), BPF_FIB_LOOKUP_SKIP_NEIGH) == BPF_FIB_LKUP_RET_SUCCESS &&
		q.ifindex == c->uplink;
}

// lower takes a hop off a packet.
static __always_inline int lower(struct __sk_buff *skb)
{
	struct iphdr *ip = first(skb) + ETH_HLEN;
	if ((void *)(ip + 1) > last(skb))
		return -1;
	__u32 s = (__u32)ip->check + bpf_htons(0x0100);
	ip->check = s + (s >= 0xffff);
	ip->ttl--;
	return 0;
}

static __always_inline int failed(void)
{
	step(FAILED);
	return DROP;
}

static __always_inline __u64 mac_key(__u8 *mac)
{
	__u64 key = 0;
	__builtin_memcpy(&key, mac, 6);
	return key;
}

static __always_inline int same(__u8 *a, __u8 *b) { return mac_key(a) == mac_key(b); }

// wrap_for says how the outer packet would go to a node.
static __always_inline int wrap_for(struct __sk_buff *skb, struct conf *c, struct flow *f, __u32 node, struct bpf_redir_neigh *to)
{
	struct flow o = { .s = c->self, .d = node, .sp = OVERLAY_PORT, .dp = OVERLAY_PORT, .size = f->size + ROOM, .proto = 17 };
	if (f->size > c->mtu || f->len > 0xffff - ROOM)
		return -1;
	// As what the node itself sends. BPF_FIB_LOOKUP_OUTPUT would ask for a way by one link, and not see that the route
	// is by another.
	return route(skb, c, &o, LOOPBACK, 0, to);
}

// wrap puts VXLAN around a packet and sends it to a node. id: what its mark would be there.
static __always_inline int wrap(struct __sk_buff *skb, struct conf *c, struct flow *f, __u32 node, __u8 *dmac, __u32 mark,
	struct bpf_redir_neigh *to)
{
	__u32 hash = bpf_get_hash_recalc(skb);
	if (bpf_skb_adjust_room(skb, ROOM, BPF_ADJ_ROOM_MAC, MODE_ENCAP))
		return failed();
	struct outer *o = first(skb);
	if ((void *)(o + 1) > last(skb))
		return failed();
	__builtin_memcpy(o->in.h_dest, dmac, 6);
	__builtin_memcpy(o->in.h_source, c->mac, 6);
	o->in.h_proto = o->eth.h_proto = bpf_htons(ETH_P_IP);
	o->vx[0] = bpf_htonl(mark & ID_BIT ? 0x88080000 | (mark & 0xffff) : 0x08000000);
	o->vx[1] = bpf_htonl(OVERLAY_VNI << 8);
	o->udp = (struct udphdr){ .source = bpf_htons(32768 + ((hash ^ hash >> 16) & 0x3fff)), .dest = bpf_htons(OVERLAY_PORT),
		.len = bpf_htons(f->len + ROOM - sizeof(struct iphdr)) };
	__u8 ecn = f->tos & 3;
	o->ip = (struct iphdr){ .version = 4, .ihl = 5, .tos = ecn == 3 ? 2 : ecn, .tot_len = bpf_htons(f->len + ROOM),
		.frag_off = bpf_htons(0x4000), .ttl = 64, .protocol = 17, .saddr = c->self, .daddr = node };
	o->ip.check = ~fold(sum(&o->ip));
	skb->mark = 0;
	step(WRAPPED);
	return bpf_redirect_neigh(c->uplink, to, sizeof(*to), 0);
}

static __always_inline void count(__u32 ip, __u16 len, int received)
{
	struct traffic *t = bpf_map_lookup_elem(&counts, &ip);
	if (!t)
		return;
	if (received)
		t->received++, t->received_bytes += len;
	else
		t->sent++, t->sent_bytes += len;
}

// forward sends on what a node, whose frame is at off, translated to a port of its block. off: what is to be taken
// off before.
static __always_inline int forward(struct __sk_buff *skb, struct conf *c, int off, __u8 *mac)
{
	struct flow f;
	struct bpf_redir_neigh to = {};
	if (parse(skb, off + ETH_HLEN, 0, &f))
		return NEXT;
	struct unit key = { .ip = f.s, .port = f.sp & UNIT };
	struct node *n = bpf_map_lookup_elem(&units, &key);
	if (!n || !same(n->mac, mac) || nobodys(f.d))
		return NEXT;
	__u64 *until = bpf_map_lookup_elem(&permits, &f.s);
	if (!until || *until <= bpf_ktime_get_boot_ns() || route(skb, c, &f, c->overlay, 0, &to))
		return NEXT;
	if (off && bpf_skb_adjust_room(skb, -off, BPF_ADJ_ROOM_MAC, 0))
		return NEXT;
	if (lower(skb))
		return failed();
	count(f.s, f.len, 0);
	step(FORWARDED);
	skb->mark = 0;
	return bpf_redirect_neigh(c->uplink, &to, sizeof(to), 0);
}

// from_overlay takes what the kernel's VXLAN has taken the outer header off, after the tables saw which node sent that.
SEC("tc") int from_overlay(struct __sk_buff *skb)
{
	struct conf *c = conf();
	struct ethhdr *eth = first(skb);
	if (!c || !plain(skb) || (void *)(eth + 1) > last(skb) || (skb->mark && (skb->mark & ~0xffffu) != ID_BIT))
		return NEXT;
	__u8 mac[6];
	__builtin_memcpy(mac, eth->h_source, 6);
	return forward(skb, c, 0, mac);
}

// unwrap takes a packet of the overlay from a node: on to the uplink where this is its gateway, and else into the
// overlay link, as the kernel would.
static __always_inline int unwrap(struct __sk_buff *skb, struct conf *c, struct flow *f)
{
	struct outer *o = first(skb);
	if ((void *)(o + 1) > last(skb) || skb->gso_size) // the kernel alone takes the header off what has segments
		return NEXT;
	__u32 flags = bpf_ntohl(o->vx[0]);
	struct ethhdr eth = o->in;
	if (o->udp.check || bpf_ntohs(o->udp.len) + sizeof(o->ip) != f->len || (f->tos & 3) == 3 ||
		eth.h_proto != bpf_htons(ETH_P_IP) || o->vx[1] != bpf_htonl(OVERLAY_VNI << 8) || !same(eth.h_dest, c->mac) ||
		(flags != 0x08000000 && (flags & 0xffff0000) != 0x88080000))
		return NEXT;
	__u64 key = mac_key(eth.h_source), now = bpf_ktime_get_boot_ns();
	struct peer *p = bpf_map_lookup_elem(&peers, &key);
	if (!p || p->underlay != f->s)
		return NEXT;
	if (now - p->heard > HEARD) {
		if (!comes(skb, c, f))
			return NEXT;
		p->heard = now;
	}
	int r = forward(skb, c, ROOM, eth.h_source);
	if (r != NEXT)
		return r;
	if (bpf_skb_adjust_room(skb, -ROOM, BPF_ADJ_ROOM_MAC, 0))
		return NEXT;
	struct ethhdr *h = first(skb);
	if ((void *)(h + 1) > last(skb))
		return failed();
	*h = eth;
	skb->mark = flags & 0x80000000 ? ID_BIT | (flags & 0xffff) : 0;
	step(UNWRAPPED);
	return bpf_redirect(c->overlay, BPF_F_INGRESS);
}

// from_uplink takes what nodes send by the overlay, and what comes for a port of another node's block.
SEC("tc") int from_uplink(struct __sk_buff *skb)
{
	struct flow f;
	struct bpf_redir_neigh to = {};
	struct conf *c = conf();
	if (!c || !plain(skb) || parse(skb, ETH_HLEN, 1, &f))
		return NEXT;
	if (f.proto == 17 && f.dp == OVERLAY_PORT && f.d == c->self)
		return skb->len == f.len + ETH_HLEN ? unwrap(skb, c, &f) : NEXT;
	struct unit key = { .ip = f.d, .port = f.dp & UNIT };
	struct node *n = bpf_map_lookup_elem(&units, &key);
	if (!n || !comes(skb, c, &f) || wrap_for(skb, c, &f, n->underlay, &to))
		return NEXT;
	__u32 node = n->underlay;
	__u8 mac[6];
	__builtin_memcpy(mac, n->mac, 6);
	if (skb->len > f.len + ETH_HLEN && bpf_skb_change_tail(skb, f.len + ETH_HLEN, 0))
		return NEXT;
	if (lower(skb))
		return failed();
	count(f.d, f.len, 1);
	return wrap(skb, c, &f, node, mac, 0, &to);
}

// to_overlay takes what the tables send to a node, and spares it the way of the outer packet. What a process sends is
// left to them: they drop it.
SEC("tc") int to_overlay(struct __sk_buff *skb)
{
	struct flow f;
	struct bpf_redir_neigh to = {};
	struct conf *c = conf();
	struct ethhdr *eth = first(skb);
	__u32 mark = skb->mark;
	if (!c || skb->sk || skb->vlan_present || skb->protocol != bpf_htons(ETH_P_IP) || (void *)(eth + 1) > last(skb) ||
		!same(eth->h_source, c->mac) || (mark && (mark & ~0xffffu) != ID_BIT))
		return NEXT;
	__u8 mac[6];
	__builtin_memcpy(mac, eth->h_dest, 6);
	if (parse(skb, ETH_HLEN, 0, &f))
		return NEXT;
	__u64 key = mac_key(mac);
	struct peer *p = bpf_map_lookup_elem(&peers, &key);
	if (!p || wrap_for(skb, c, &f, p->underlay, &to))
		return NEXT;
	return wrap(skb, c, &f, p->underlay, mac, mark, &to);
}

char _license[] SEC("license") = "GPL";
