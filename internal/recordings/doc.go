// SPDX-License-Identifier: Apache-2.0

// Package recordings is the page on which readers find and watch recorded sessions.
//
// What is in a recording was written by programs in pods, and who wants to hide something
// or to attack its reader can write anything. So nothing of it reaches the browser as
// markup: a terminal is emulated here ([screen]), and the page gets cells with text and
// colors, as JSON, which its script turns into text nodes. The emulator gets no control
// sequence that is not on a list, and all that it can hold is bounded.
//
//	store -> index -> list, filters, search      which recordings are there?
//	store -> cast -> screen -> frames -> player  what did its terminal show?
//	                        -> transcript        which text appeared on it, and when?
package recordings
