// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"slices"
)

// estimate is a median with its 95 % confidence interval.
type estimate struct{ median, low, high float64 }

// estimateOf returns the median of values. The interval lies between two order
// statistics, so it holds for any distribution: as many values are left out at both
// ends as possible while the chance that the median lies outside stays at most 5 %.
func estimateOf(values []float64) estimate {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	if n == 0 {
		return estimate{math.NaN(), math.NaN(), math.NaN()}
	}
	median := (sorted[(n-1)/2] + sorted[n/2]) / 2
	outside, drop := 0.0, 0
	for k := 0; k < n/2; k++ {
		outside += 2 * binomial(n, k) / math.Pow(2, float64(n))
		if outside > 0.05 {
			break
		}
		drop = k
	}
	return estimate{median, sorted[drop], sorted[n-1-drop]}
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

// ratio estimates a/b, round by round.
func ratio(a, b []float64) estimate {
	values := make([]float64, min(len(a), len(b)))
	for i := range values {
		values[i] = a[i] / b[i]
	}
	return estimateOf(values)
}

// each returns f of every sample.
func each[S any](samples []S, f func(S) float64) []float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = f(s)
	}
	return values
}
