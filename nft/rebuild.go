package nft

import (
	"maps"
	"slices"
)

// rebuild returns what makes everything of the table but elements as it must be: sets that are right keep theirs, and
// counters their counts. Rules go first and come last, because they hold on to sets, counters and chains; the whole is
// one transaction.
func (t table) rebuild(old observedTable) []op {
	// Rules are flushed even where none were seen: adding them twice must not make them two.
	ops := append([]op{t.addTable(), t.flush()}, t.remove(old)...)
	for _, s := range t.sets {
		if s.fault(old) != "" {
			ops = append(ops, t.addSet(s))
		}
	}
	for _, name := range t.counters {
		if old.objects[name] != objectCounter {
			ops = append(ops, t.addCounter(name))
		}
	}
	for _, ch := range t.chains {
		if !ch.stays(old) {
			ops = append(ops, t.addChain(ch))
		}
	}
	id := uint32(2) // 1 is that of all named sets
	for _, ch := range t.chains {
		for _, r := range ch.rules {
			ops = append(ops, t.addRule(ch.name, r, id))
			id += uint32(len(r.sets))
		}
	}
	return ops
}

// remove returns what takes away what is not ours in our table, or is not as it must be. Sets go before chains, for a
// verdict map holds on to chains.
func (t table) remove(old observedTable) []op {
	var ops []op
	for _, name := range slices.Sorted(maps.Keys(old.sets)) {
		i := slices.IndexFunc(t.sets, func(s set) bool { return s.name == name })
		if i < 0 || t.sets[i].fault(old) != "" {
			ops = append(ops, t.deleteSet(set{flags: old.sets[name].flags}.noun(), name))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(old.objects)) {
		if kind := old.objects[name]; kind != objectCounter || !slices.Contains(t.counters, name) {
			ops = append(ops, t.deleteObject(name, kind))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(old.chains)) {
		i := slices.IndexFunc(t.chains, func(c chain) bool { return c.name == name })
		if i < 0 || !t.chains[i].stays(old) {
			ops = append(ops, t.deleteChain(name))
		}
	}
	return ops
}

// stays reports whether the chain is there and called where it must be, whatever its rules.
func (c chain) stays(old observedTable) bool {
	have, ok := old.chains[c.name]
	return ok && have.hook == c.hook.observed()
}
