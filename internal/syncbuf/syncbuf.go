// Package syncbuf gives a test a buffer that one goroutine reads while another writes. Nothing of it reaches a binary.
package syncbuf

import (
	"bytes"
	"sync"
)

// Buffer holds what was written to it so far. The zero Buffer is empty, and ready.
type Buffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
