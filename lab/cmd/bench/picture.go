// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
)

// picture returns a bar chart, as SVG, of the CPU time of a small answer.
func (r *report) picture() []byte {
	kinds := []string{bare, plugin, official}
	colours := map[string]string{bare: "#9aa4b2", plugin: "#1f78d1", official: "#d98b2b"}
	most := 1.0
	for _, callers := range concurrencies {
		for _, kind := range kinds {
			most = max(most, estimateOf(cpus(r.loads[loadKey{newPlain, callers}][kind])).high)
		}
	}
	const (
		left, right, width = 190.0, 90.0, 760.0
		bar, gap, group    = 20.0, 4.0, 96.0
		top                = 50.0
	)
	height := top + group*float64(len(concurrencies))
	scale := (width - left - right) / most
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="13" role="img" aria-label="CPU time of the proxy per request">
<rect width="100%%" height="100%%" fill="#ffffff"/>
<text x="12" y="26" font-size="16" font-weight="bold" fill="#1c2330">CPU time of the proxy per request of 2 KB on a new connection, plain HTTP, in microseconds (lower is better)</text>
`, width, height)
	for i, callers := range concurrencies {
		y := top + group*float64(i)
		s := "s"
		if callers == 1 {
			s = ""
		}
		fmt.Fprintf(&b, `<text x="12" y="%.0f" font-weight="bold" fill="#1c2330">%d caller%s</text>`+"\n", y+bar/2+4, callers, s)
		for j, kind := range kinds {
			e := estimateOf(cpus(r.loads[loadKey{newPlain, callers}][kind]))
			y := y + (bar+gap)*float64(j)
			middle := y + bar/2
			fmt.Fprintf(&b, `<text x="%.0f" y="%.1f" text-anchor="end" fill="#1c2330">%s</text>`+"\n", left-8, middle+4, short(kind))
			fmt.Fprintf(&b, `<rect x="%.0f" y="%.1f" width="%.1f" height="%.0f" fill="%s"/>`+"\n", left, y, e.median*scale, bar, colours[kind])
			fmt.Fprintf(&b, `<path d="M%.1f %.1fH%.1f" stroke="#1c2330" stroke-width="1.5"/>`+"\n", left+e.low*scale, middle, left+e.high*scale)
			fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" fill="#1c2330">%.0f</text>`+"\n", left+e.high*scale+6, middle+4, e.median)
		}
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// short returns an abbreviated name of a kind.
func short(kind string) string {
	if kind == bare {
		return "bare"
	}
	return kind
}
