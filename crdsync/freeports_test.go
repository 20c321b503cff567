package crdsync

import (
	"math/rand/v2"
	"testing"

	"github.com/egret-project/egret/egress"
)

// span is some ports.
type span struct {
	first uint16
	size  int
}

func TestABlockIsTakenFromTheSmallestHole(t *testing.T) {
	all := []span{{2048, 2048}, {4096, 4096}, {8192, 8192}, {16384, 16384}, {32768, 32768}}
	for name, tt := range map[string]struct {
		taken []span
		size  int
		want  uint16 // 0: there is no room
	}{
		"the smallest hole that has room":                   {nil, 1024, 2048},
		"the whole of a hole":                               {nil, 4096, 4096},
		"the largest there is":                              {nil, 32768, 32768},
		"the other half of one that is begun":               {[]span{{8192, 4096}}, 4096, 4096},
		"a hole within what is begun, not a whole one":      {[]span{{2048, 2048}, {4096, 64}}, 64, 4160},
		"of two holes of one size the lower":                {[]span{{2048, 64}, {4096, 64}}, 64, 2112},
		"the half that is left of one, before a larger one": {[]span{{2048, 2048}, {4096, 4096}, {8192, 1024}}, 1024, 9216},
		"a block is aligned to its size":                    {[]span{{2048, 2048}, {4096, 64}}, 2048, 6144},
		"no large one where small ones are spread":          {[]span{{32768, 64}}, 32768, 0},
		"the last port is of a block":                       {all[:4], 32768, 32768},
		"nothing is given":                                  {nil, egress.MaxBlock, 32768},
		"nothing is left":                                   {all, 64, 0},
		"one slot is left":                                  {[]span{{2048, 2048}, {4096, 4096}, {8192, 8192}, {16384, 16384}, {32768, 16384}, {49152, 8192}, {57344, 4096}, {61440, 2048}, {63488, 1024}, {64512, 512}, {65024, 256}, {65280, 128}, {65408, 64}}, 64, 65472},
		"a port in the middle takes its slot":               {[]span{{2049, 1}}, 64, 2112},
	} {
		r := newFreePorts()
		for _, s := range tt.taken {
			r.take(s.first, s.size)
		}
		if got, ok := r.place(tt.size); ok != (tt.want != 0) || ok && got != tt.want {
			t.Errorf("%s: %d, %t, want %d", name, got, ok, tt.want)
		}
	}
}

func TestARecordWithItsFirstPortAloneTakesAllThatItMayBe(t *testing.T) {
	for first, want := range map[uint16]span{
		2048: {2048, 2048}, 3072: {3072, 1024}, 2112: {2112, 64}, 32768: {32768, 32768}, 49152: {49152, 16384}, 2049: {2048, 64}, 65535: {65472, 64}, 0: {0, 32768}, 65472: {65472, 64},
	} {
		if from, size := extent(first); (span{from, size}) != want {
			t.Errorf("%d: %d ports from %d, want %v", first, size, from, want)
		}
	}
}

// Two bits of a byte of a script say what is done, the others which size or block. Its seed tells a failed one.
func TestBlocksGivenAndTakenAtRandomFindEveryHole(t *testing.T) {
	for range 40 {
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 0))
		script := make([]byte, 400)
		for i := range script {
			script[i] = byte(r.Uint32())
		}
		var given []span
		ports := func() (r *freePorts, taken [1 << 16]bool) {
			r = newFreePorts()
			for _, s := range given {
				r.take(s.first, s.size)
				for p := range s.size {
					taken[int(s.first)+p] = true
				}
			}
			return r, taken
		}
		for _, b := range script {
			if b&3 == 0 && len(given) > 0 {
				i := int(b>>2) % len(given)
				gone := given[i]
				given = append(given[:i], given[i+1:]...)
				r, _ := ports()
				if _, ok := r.place(gone.size); !ok {
					t.Fatalf("seed %d: %v was given back, and there is no room for it", seed, gone)
				}
				continue
			}
			size := egress.MinBlock << (int(b>>2) % 10)
			r, taken := ports()
			first, ok := r.place(size)
			if ok == (anyFree(taken, size) == 0) {
				t.Fatalf("seed %d: %d ports: room %t, with %v given", seed, size, ok, given)
			}
			if !ok {
				continue
			}
			if err := (egress.Block{First: first, Size: size}).Fault(); err != nil || int(first)+size > 1<<16 {
				t.Fatalf("seed %d: %d ports from %d: %v", seed, size, first, err)
			}
			for p := range size {
				if taken[int(first)+p] {
					t.Fatalf("seed %d: %d ports from %d: %d is taken", seed, size, first, int(first)+p)
				}
			}
			given = append(given, span{first, size})
		}
	}
}

// anyFree returns the first port of a free block, found the simplest way; 0: there is none. Both numbers are powers of
// two: so is the larger.
func anyFree(taken [1 << 16]bool, size int) int {
next:
	for first := max(size, egress.FirstBlockPort); first+size <= 1<<16; first += size {
		for p := range size {
			if taken[first+p] {
				continue next
			}
		}
		return first
	}
	return 0
}
