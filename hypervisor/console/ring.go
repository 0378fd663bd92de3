// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

// ring holds the last HistoryBytes that were written.
type ring struct {
	b     []byte // grows up to HistoryBytes, then is overwritten
	start int    // of the oldest byte, once b is full
}

func (r *ring) write(p []byte) {
	if len(p) > HistoryBytes {
		p = p[len(p)-HistoryBytes:]
	}
	grow := min(len(p), HistoryBytes-len(r.b))
	r.b = append(r.b, p[:grow]...)
	for p = p[grow:]; len(p) > 0; {
		n := copy(r.b[r.start:], p)
		r.start = (r.start + n) % HistoryBytes
		p = p[n:]
	}
}

// last returns a copy of the last n bytes, or of all there are.
func (r *ring) last(n int) []byte {
	n = max(0, min(n, len(r.b)))
	out := make([]byte, 0, n)
	from := (r.start + len(r.b) - n) % max(1, len(r.b))
	out = append(out, r.b[from:min(len(r.b), from+n)]...)
	return append(out, r.b[:n-len(out)]...)
}
