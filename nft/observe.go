package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Observed is what the kernel holds of our tables, read at one moment. The zero Observed is a kernel without them.
type Observed struct {
	tables []observedTable // as tables() has them, or empty
	// socket is the one that tables are to be owned by; 0: they are not to be, or cannot be.
	socket uint32
	serial uint64 // of the Observe that returned it
}

// Pods returns the local selected pods that the tables have, as State.Pods has them.
func (o Observed) Pods() map[netip.Addr]egress.ID {
	pods := map[netip.Addr]egress.ID{}
	for _, f := range families {
		if len(o.tables) == 0 {
			break
		}
		for k, v := range o.tables[0].elements["pod"+f.digit] {
			ip, _ := netip.AddrFromSlice([]byte(k))
			pods[ip] = egress.ID(egress.Mark(binary.BigEndian.Uint32([]byte(v))) & egress.Mark(egress.MaxID))
		}
	}
	return pods
}

type observedTable struct {
	exists   bool
	flags    uint32
	socket   uint32 // the one that owns it; 0: none
	chains   map[string]observedChain
	sets     map[string]observedSet // without anonymous ones
	objects  map[string]objectKind
	packets  map[string]uint64   // of counters
	limits   map[string]string   // objects too, where there is a map of them: their values
	elements map[string]elements // of the sets that a State fills and that are as they must be
}

type observedChain struct {
	hook observedHook
	tags []string // of its rules, in order; "" for a rule that is not ours
}

// observedHook is comparable; zero for a chain that is only jumped to.
type observedHook struct {
	kind   string
	num    uint32
	prio   int32
	policy uint32
	device string
}

// observedSet is comparable.
type observedSet struct {
	flags, key, keyLen, value, valueLen, object, size uint32
	counted                                           bool
}

// objectKind is NFT_OBJECT_* (linux/netfilter/nf_tables.h).
type objectKind uint32

const objectCounter = objectKind(nftables.ObjTypeCounter)

func (k objectKind) String() string {
	names := []string{"object", "counter", "quota", "ct helper", "limit", "connlimit", "tunnel", "ct timeout", "secmark", "ct expectation", "synproxy"}
	if int(k) >= len(names) {
		k = 0
	}
	return names[k]
}

// reads is how often Observe starts again when the ruleset changes under it. A read takes a few milliseconds, and a
// busy node commits less often than that, so that the third one hardly ever happens.
const reads = 20

// wholeEvery is how often everything is read all the same: should the kernel not be as its events say, that is mended
// then.
const wholeEvery = 5 * time.Minute

// errChanged says that a read was not of one moment.
var errChanged = errors.New("the ruleset changed while it was read")

// Observe reads all our tables. That one is absent is no error. What it returns is whole and of one moment: a dump that
// was interrupted, or during which anything of the ruleset changed, is read again, and an error after the last attempt.
//
// What is known is not read again: what was read last, with what Apply wrote since, as long as nobody else has
// committed anything or, while Watch runs, anything about our tables. But the chains of netdev go with their links,
// without a commit; and after wholeEvery everything is read.
func (t *Tables) Observe() (Observed, error) {
	t.observing.Lock()
	defer t.observing.Unlock()
	t.serial++
	o, known := Observed{socket: t.socket, serial: t.serial}, t.observed
	t.observed = Observed{}
	err := t.read.whole(func(generation uint32) error {
		o.tables = nil
		again := len(known.tables) > 0 && time.Since(t.wholeAt) < wholeEvery && (generation == t.generation || t.events.spare(generation))
		if !again {
			known.tables, t.wholeAt = nil, time.Now()
			t.events.reset(generation)
		}
		for i, want := range tables(State{}) {
			if len(known.tables) > i {
				have := known.tables[i]
				if want.family == nftables.TableFamilyNetdev && have.exists {
					have.chains = map[string]observedChain{}
					if err := t.observeChains(want, &have); err != nil {
						return fmt.Errorf("reading table %s: %w", want.id(), err)
					}
				}
				o.tables = append(o.tables, have)
				continue
			}
			have, err := t.observe(want)
			if err != nil {
				return fmt.Errorf("reading table %s: %w", want.id(), err)
			}
			o.tables = append(o.tables, have)
		}
		t.generation = generation
		return nil
	})
	if err != nil {
		return Observed{}, err
	}
	t.observed = o
	return o, nil
}

func (t *Tables) observe(want table) (observedTable, error) {
	o := observedTable{
		chains: map[string]observedChain{}, sets: map[string]observedSet{},
		objects: map[string]objectKind{}, packets: map[string]uint64{}, limits: map[string]string{}, elements: map[string]elements{},
	}
	m, err := t.read.get(unix.NFT_MSG_GETTABLE, want, attrName(unix.NFTA_TABLE_NAME, want.name))
	if errors.Is(err, unix.ENOENT) {
		return o, nil
	} else if err != nil {
		return o, err
	}
	o.exists = true
	for _, a := range m {
		o.flags, o.socket = a.uint32(unix.NFTA_TABLE_FLAGS), a.uint32(attrTableOwner)
	}
	if err := errors.Join(t.observeChains(want, &o), t.observeSets(want, &o), t.observeObjects(want, &o)); err != nil {
		return o, err
	}
	for _, s := range want.sets {
		if _, ok := o.sets[s.name]; !ok || s.fault(o) != "" || !s.fromState() {
			continue
		}
		list, err := t.dumpSet(want, s.name)
		if err != nil {
			return o, fmt.Errorf("set %s: %w", s.name, err)
		}
		if o.elements[s.name], err = s.decode(list, o.limits); err != nil {
			return o, fmt.Errorf("set %s: %w", s.name, err)
		}
	}
	return o, nil
}

func (t *Tables) observeChains(want table, o *observedTable) error {
	chains, err := t.read.dump(unix.NFT_MSG_GETCHAIN, want)
	if err != nil {
		return fmt.Errorf("chains: %w", err)
	}
	for _, a := range chains {
		if a.string(unix.NFTA_CHAIN_TABLE) != want.name {
			continue // the kernel filters chains by family only
		}
		var c observedChain
		if b, ok := a[unix.NFTA_CHAIN_HOOK]; ok {
			h, err := decode(b)
			if err != nil {
				return fmt.Errorf("chains: %w", err)
			}
			c.hook = observedHook{a.string(unix.NFTA_CHAIN_TYPE), h.uint32(unix.NFTA_HOOK_HOOKNUM),
				int32(h.uint32(unix.NFTA_HOOK_PRIORITY)), a.uint32(unix.NFTA_CHAIN_POLICY), h.string(unix.NFTA_HOOK_DEV)}
		}
		o.chains[a.string(unix.NFTA_CHAIN_NAME)] = c
	}
	rules, err := t.read.dump(unix.NFT_MSG_GETRULE, want, attrName(unix.NFTA_RULE_TABLE, want.name))
	if err != nil {
		return fmt.Errorf("rules: %w", err)
	}
	for _, a := range rules {
		if a.string(unix.NFTA_RULE_TABLE) != want.name {
			continue
		}
		name := a.string(unix.NFTA_RULE_CHAIN)
		c := o.chains[name]
		c.tags = append(c.tags, tagOf(a[unix.NFTA_RULE_USERDATA]))
		o.chains[name] = c
	}
	return nil
}

func (t *Tables) observeSets(want table, o *observedTable) error {
	sets, err := t.read.dump(unix.NFT_MSG_GETSET, want, attrName(unix.NFTA_SET_TABLE, want.name))
	if err != nil {
		return fmt.Errorf("sets: %w", err)
	}
	for _, a := range sets {
		flags := a.uint32(unix.NFTA_SET_FLAGS)
		if flags&unix.NFT_SET_ANONYMOUS != 0 {
			continue // part of a rule
		}
		desc, err := decode(a[unix.NFTA_SET_DESC])
		if err != nil {
			return fmt.Errorf("sets: %w", err)
		}
		o.sets[a.string(unix.NFTA_SET_NAME)] = observedSet{flags, a.uint32(unix.NFTA_SET_KEY_TYPE), a.uint32(unix.NFTA_SET_KEY_LEN),
			a.uint32(unix.NFTA_SET_DATA_TYPE), a.uint32(unix.NFTA_SET_DATA_LEN), a.uint32(unix.NFTA_SET_OBJ_TYPE), desc.uint32(unix.NFTA_SET_DESC_SIZE), a[attrSetExpr] != nil}
	}
	return nil
}

func (t *Tables) observeObjects(want table, o *observedTable) error {
	objects, err := t.read.dump(unix.NFT_MSG_GETOBJ, want, attrName(unix.NFTA_OBJ_TABLE, want.name))
	if err != nil {
		return fmt.Errorf("objects: %w", err)
	}
	ours := slices.ContainsFunc(want.sets, func(s set) bool { return s.object == objectLimit })
	for _, a := range objects {
		name, kind := a.string(unix.NFTA_OBJ_NAME), objectKind(a.uint32(unix.NFTA_OBJ_TYPE))
		if kind == objectLimit && ours {
			if o.limits[name], err = decodeLimit(a[unix.NFTA_OBJ_DATA]); err != nil {
				return fmt.Errorf("limit %s: %w", name, err)
			}
			continue
		}
		o.objects[name] = kind
		if kind != objectCounter {
			continue
		}
		c, err := decode(a[unix.NFTA_OBJ_DATA])
		if err != nil {
			return fmt.Errorf("counter %s: %w", name, err)
		}
		o.packets[name] = c.uint64(unix.NFTA_COUNTER_PACKETS)
	}
	return nil
}

// Counters returns the packets that each of the Counter constants has counted. It is empty when the tables are absent,
// and begins again at 0 when they are made anew.
func (t *Tables) Counters() (map[string]uint64, error) {
	all := map[string]uint64{}
	for _, want := range tables(State{}) {
		var o observedTable
		// Several dumps need not be of one moment here: each one of a counter stands for itself.
		o.objects, o.packets, o.limits = map[string]objectKind{}, map[string]uint64{}, map[string]string{}
		if err := t.observeObjects(want, &o); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("reading table %s: %w", want.id(), err)
		}
		for _, name := range want.counters {
			if n, ok := o.packets[name]; ok {
				all[name] = n
			}
		}
	}
	return all, nil
}

// absent ends what damage says of a table that is not there.
const absent = ": absent"

// damage says what of the table is not as it must be, elements apart. Empty: nothing.
func (t table) damage(o observedTable) []string {
	if !o.exists {
		return []string{t.id() + absent}
	}
	var out []string
	report := func(format string, args ...any) {
		out = append(out, t.id()+": "+fmt.Sprintf(format, args...))
	}
	if o.flags != t.flags {
		report("flags 0x%x", o.flags) // as dormant, which switches it off
	}
	own := map[string]bool{}
	for _, s := range t.sets {
		own[s.name] = true
		if f := s.fault(o); f != "" {
			report("%s %s: %s", s.noun(), s.name, f)
		}
	}
	for _, name := range t.counters {
		own[name] = true
		if o.objects[name] != objectCounter {
			report("counter %s: absent", name)
		}
	}
	for _, c := range t.chains {
		own[c.name] = true
		if f := c.fault(o); f != "" {
			report("chain %s: %s", c.name, f)
		}
	}
	for _, names := range [][]string{slices.Sorted(maps.Keys(o.sets)), slices.Sorted(maps.Keys(o.objects)), slices.Sorted(maps.Keys(o.chains))} {
		for _, name := range names {
			if !own[name] {
				report("%s: not ours", name)
			}
		}
	}
	return out
}

// fault says in what the set is not as it must be; "" when it is.
func (s set) fault(o observedTable) string {
	have, ok := o.sets[s.name]
	if !ok {
		return "absent"
	}
	want := observedSet{s.flags, s.key.GetNFTMagic(), s.key.Bytes, s.value.GetNFTMagic(), s.value.Bytes, uint32(s.object), s.size, s.counted}
	if have != want {
		return "of another type"
	}
	return ""
}

// fault says in what the chain is not as it must be; "" when it is.
func (c chain) fault(o observedTable) string {
	have, ok := o.chains[c.name]
	if !ok {
		return "absent"
	}
	if have.hook != c.hook.observed() {
		return "called elsewhere"
	}
	for i, tag := range have.tags {
		if i >= len(c.rules) || tag != c.rules[i].tag {
			return fmt.Sprintf("rule %d: not as written", i+1)
		}
	}
	if len(have.tags) < len(c.rules) {
		return fmt.Sprintf("%d of %d rules", len(have.tags), len(c.rules))
	}
	return ""
}

func (h hook) observed() observedHook {
	if h == (hook{}) {
		return observedHook{}
	}
	return observedHook{string(h.kind), uint32(h.num), int32(h.prio), uint32(nftables.ChainPolicyAccept), h.device}
}

// tagOf returns our tag in the user data of a rule, or "": a list of type, length and value, one byte each for the
// first two.
func tagOf(b []byte) string {
	for len(b) >= 2 && len(b) >= 2+int(b[1]) {
		if b[0] == tagType {
			return string(b[2 : 2+b[1]])
		}
		b = b[2+int(b[1]):]
	}
	return ""
}
