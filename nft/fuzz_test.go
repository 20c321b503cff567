package nft

import "testing"

// Whatever the kernel, or who writes into the agent's socket, says: no more than an error comes of it.
func FuzzDecode(f *testing.F) {
	for _, b := range [][]byte{nil, {4, 0, 1, 0}, {3, 0, 1, 0}, {8, 0, 1, 0, 0, 0, 0, 7}, {12, 0, 1, 0x80, 8, 0, 1, 0, 10, 0, 0, 1}, {255, 255, 1, 0}, {5, 0, 2, 0, 1}} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := decodeElement(b); err == nil && len(e.key)+len(e.value) > len(b) {
			t.Errorf("%x says %+v", b, e)
		}
		a, _ := decode(b) // what was read until an error
		for typ := range a {
			_, _ = a.uint32(typ), a.string(typ)
		}
	})
}
