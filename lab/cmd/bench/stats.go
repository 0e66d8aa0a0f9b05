// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"slices"
)

// risk is how likely it may be that an interval misses the true median.
const risk = 0.05

// estimate is a median with its confidence interval.
type estimate struct{ median, low, high float64 }

// estimateOf returns the median of values with its 95 % interval.
func estimateOf(values []float64) estimate {
	e, _ := estimateAt(values, risk)
	return e
}

// estimateAt returns the median of values with its interval. The interval lies between
// two order statistics, so it holds for any distribution: as many values are left out at
// both ends as possible while the chance that the median lies outside stays at most
// atMost. If there are too few values for that, it reports false, and the interval goes
// from the lowest to the highest.
func estimateAt(values []float64, atMost float64) (_ estimate, ok bool) {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	if n == 0 {
		return estimate{math.NaN(), math.NaN(), math.NaN()}, false
	}
	median := (sorted[(n-1)/2] + sorted[n/2]) / 2
	outside, drop := 0.0, 0
	for k := 0; k < n/2; k++ {
		outside += 2 * binomial(n, k) / math.Pow(2, float64(n))
		if outside > atMost {
			break
		}
		drop, ok = k, true
	}
	return estimate{median, sorted[drop], sorted[n-1-drop]}, ok
}

func binomial(n, k int) float64 {
	b := 1.0
	for i := range k {
		b = b * float64(n-i) / float64(i+1)
	}
	return b
}

// show returns the estimate with that many decimals.
func (e estimate) show(decimals int) string {
	return fmt.Sprintf("%.*f (%.*f-%.*f)", decimals, e.median, decimals, e.low, decimals, e.high)
}

// pairs returns a/b of each round. What slows a whole round down, such as another
// process on the machine, is in both and cancels out.
func pairs(a, b []float64) []float64 {
	values := make([]float64, min(len(a), len(b)))
	for i := range values {
		values[i] = a[i] / b[i]
	}
	return values
}

// ratio estimates a/b, round by round.
func ratio(a, b []float64) estimate { return estimateOf(pairs(a, b)) }

// each returns f of every sample.
func each[S any](samples []S, f func(S) float64) []float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = f(s)
	}
	return values
}
