package gossip

import (
	"bytes"
	"errors"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"
)

// reloadAfter is how often Config.Keys is asked. A kubelet writes a Secret that has changed within a minute or two.
const reloadAfter = 10 * time.Second

// keyring is what the members' traffic is encrypted with.
type keyring struct {
	ring     *memberlist.Keyring
	asked    time.Time // when Config.Keys was, by Run alone
	keyFault string    // what it said then
}

// rekey has the members' traffic encrypted with the keys that there are now. A fault leaves those that there were, and
// is logged once.
func (g *Gossip) rekey() {
	if g.cfg.Keys == nil || time.Since(g.asked) < g.cfg.keysEvery {
		return
	}
	g.asked = time.Now()
	keys, err := g.cfg.Keys()
	if err == nil && len(keys) == 0 {
		err = errors.New("there is no key")
	}
	changed := false
	if err == nil {
		changed, err = install(g.ring, keys)
	}
	said := g.keyFault
	g.keyFault = ""
	if err != nil {
		if g.keyFault = err.Error(); g.keyFault != said {
			g.cfg.Log.Warn("the gossip's keys stay as they were", "err", err)
		}
		return
	}
	if changed {
		g.cfg.Log.Info("the gossip's keys have changed", "keys", len(keys))
	}
}

// install makes the keys those of the ring: the first is for what is sent. It reports whether there were others, or
// another first one.
func install(ring *memberlist.Keyring, keys [][]byte) (changed bool, err error) {
	for _, key := range keys {
		if err := memberlist.ValidateKey(key); err != nil {
			return false, err
		}
	}
	use := func(key []byte) {
		changed = true
		err = errors.Join(err, ring.UseKey(key))
	}
	for _, key := range keys {
		if !has(ring.GetKeys(), key) {
			changed = true
			err = errors.Join(err, ring.AddKey(key))
		}
	}
	if !bytes.Equal(ring.GetPrimaryKey(), keys[0]) {
		use(keys[0])
	}
	// A ring moves what comes after a key that is removed, under the hands of whoever reads. What is used goes to the
	// front: so those that stay do, and then there is nothing after those that go.
	all := ring.GetKeys()
	first := slices.IndexFunc(all, func(key []byte) bool { return !has(keys, key) })
	if first < 0 {
		return changed, err
	}
	if rest := slices.DeleteFunc(slices.Clone(all[first:]), func(key []byte) bool { return !has(keys, key) }); len(rest) > 0 {
		for _, key := range rest {
			use(key)
		}
		use(keys[0])
	}
	for _, key := range slices.Backward(ring.GetKeys()) {
		if !has(keys, key) {
			changed = true
			err = errors.Join(err, ring.RemoveKey(key))
		}
	}
	return changed, err
}

func has(keys [][]byte, key []byte) bool {
	return slices.ContainsFunc(keys, func(k []byte) bool { return bytes.Equal(k, key) })
}
